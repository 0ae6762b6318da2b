// The shortest way from Python to pair_loss. Most batches need no care: ordinary tensors of the right types
// on one device, with nothing under way that wants to see the call. Telling them apart takes a microsecond
// here and ten in Python, and twice that where the kernels of the step before have emptied the processor's
// caches. All others go through Python's checks, which explain and convert.
#include "torch/fast_path.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>

#include "torch/autograd.h"

namespace dml {
namespace {

namespace py = pybind11;
using at::Tensor;

// The tensor, where there is one of torch's own two classes and not of inference mode or forward-mode
// differentiation; nothing for None.
bool take(py::handle object, OptionalTensor& tensor) {
    if (object.is_none()) return true;
    if (!THPVariable_CheckExact(object.ptr())) return false;
    tensor = THPVariable_Unpack(object.ptr());
    return tensor->layout() == at::kStrided && !tensor->is_inference() && !has_tangent(*tensor);
}

bool are_points(const Tensor& x) {
    const auto type = x.scalar_type();
    return x.dim() == 2 &&
           (type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble);
}

bool are_labels(const Tensor& labels, const Tensor& points) {
    return labels.dim() == 1 && labels.scalar_type() == at::kLong && labels.size(0) == points.size(0) &&
           labels.device() == points.device();
}

// Whether somebody wants to see calls of Python functions, or transforms the tensors they are given.
bool is_watched() {
    return at::impl::torch_function_mode_enabled() || c10::impl::tls_local_dispatch_key_set().included_.has(
                                                          c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// The loss in the dtype that the embeddings ask for, or None.
py::object fast_pair_loss(py::handle embeddings, py::handle labels, py::handle ref_emb, py::handle ref_labels,
                          py::handle self_index, py::handle num_valid_refs, std::string_view formula,
                          const std::vector<double>& params, std::optional<double> epsilon,
                          std::string_view similarity, std::string_view reduction, bool mine_self_pair,
                          bool divide, bool on_cuda) {
    OptionalTensor x, y, r, ry, self, count;
    if (is_watched() || !take(embeddings, x) || !take(labels, y) || !take(ref_emb, r) ||
        !take(ref_labels, ry) || !take(self_index, self) || !take(num_valid_refs, count)) {
        return py::none();
    }
    if (!x || !y || !are_points(*x) || !are_labels(*y, *x)) return py::none();
    if (!x->is_cpu() && !(on_cuda && x->is_cuda())) return py::none();
    if (r.has_value() != ry.has_value()) return py::none();
    if (r && (!are_points(*r) || !are_labels(*ry, *r) || r->size(1) != x->size(1) ||
              r->scalar_type() != x->scalar_type() || r->device() != x->device())) {
        return py::none();
    }
    Tensor loss;
    {
        const py::gil_scoped_release others_may_run;
        const bool save = needs_gradient(*x, r);
        loss = std::get<0>(dispatch_pair_loss({*x, *y, r, ry, self, count, formula, params, epsilon,
                                               similarity, reduction, mine_self_pair, divide, save}));
        const auto wanted =
            at::autocast::is_autocast_enabled(x->device().type()) ? at::kFloat : x->scalar_type();
        if (loss.scalar_type() != wanted) loss = loss.to(wanted);
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(loss));
}

}  // namespace

void def_fast_path(py::module_& m) {
    m.def("fast_pair_loss", &fast_pair_loss,
          "pair_loss of a batch that needs no care, in the dtype that the embeddings ask for, or None.");
}

}  // namespace dml
