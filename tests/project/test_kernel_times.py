"""The tables that tools.kernel_times makes of a profile; measuring needs a GPU."""

from tools.kernel_times import table, total_times

FIND = "void dml::cuda::find_extremes<float>(dml::cuda::TileGroup<float>, dml::cuda::Partials<float>)"


def test_kernels_are_added_up_without_those_of_pytorch():
    events = [
        ("void dml::cuda::(anonymous namespace)::weigh_rows<float>(dml::cuda::RowStats<float>)", 4.0),
        (FIND, 10.0),
        (FIND, 30.0),
        ("Memset (Device)", 100.0),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>(int)", 100.0),
    ]
    assert total_times(events, calls=2) == {"find_extremes": 20.0, "weigh_rows": 2.0}
    assert list(total_times(events, calls=2)) == ["find_extremes", "weigh_rows"]


def test_table_names_the_longest():
    of_case = {name: float(9 - k) for k, name in enumerate("abcdef")}
    assert "| case one | 39 | a 9, b 8, c 7, d 6, e 5 |" in table({"case one": of_case})
