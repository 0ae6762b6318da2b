// The eager fast path. It takes ordinary tensors of the right types on one device, while nothing wants to see
// the call, and returns None for all else, which Python then validates and converts. The checks take a
// microsecond here and ten in Python, and twice that where the step before has emptied the processor's
// caches.
#include "torch/fast_path.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <pybind11/stl.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include "custom/registry.h"
#include "torch/autograd.h"
#include "torch/precision.h"

namespace dml {
namespace {

namespace py = pybind11;
using at::Tensor;

// Unpacks a tensor of torch's own two classes, which is neither of inference mode nor of forward-mode
// differentiation. None is fine, and unpacks to none.
bool unpack(py::handle object, OptionalTensor& tensor) {
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

// Whether a mode sees calls of Python functions, a transform of torch.func is active, or torch.jit.trace
// records the ops that Python calls.
bool is_watched() {
    return at::impl::torch_function_mode_enabled() ||
           c10::impl::tls_local_dispatch_key_set().included_.has(
               c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
           torch::jit::tracer::isTracing();
}

bool has_cuda_kernels(std::string_view formula) {
#ifdef DML_CUDA_VERSION
    const FormulaInfo* info = formula_named(formula);
    const CustomFormula* custom = info ? custom_formula(info->id) : nullptr;
    return info && info->on_cuda && (!custom || custom->cuda);
#else
    (void)formula;
    return false;
#endif
}

// The loss in the dtype that the embeddings ask for, or None. Of the options, precision and save_for_backward
// are found out here.
py::object fast_pair_loss(const PairOptions& given, py::handle embeddings, py::handle labels,
                          py::handle ref_emb, py::handle ref_labels, py::handle self_index,
                          py::handle num_valid_refs, py::handle row_weights) {
    OptionalTensor x, y, r, ry, self, count, weights;
    if (is_watched() || !unpack(embeddings, x) || !unpack(labels, y) || !unpack(ref_emb, r) ||
        !unpack(ref_labels, ry) || !unpack(self_index, self) || !unpack(num_valid_refs, count) ||
        !unpack(row_weights, weights)) {
        return py::none();
    }
    if (!x || !y || !are_points(*x) || !are_labels(*y, *x)) return py::none();
    if (!x->is_cpu() && !(x->is_cuda() && has_cuda_kernels(given.formula))) return py::none();
    if (r.has_value() != ry.has_value()) return py::none();
    if (r && (!are_points(*r) || !are_labels(*ry, *r) || r->size(1) != x->size(1) ||
              r->scalar_type() != x->scalar_type() || r->device() != x->device())) {
        return py::none();
    }
    Tensor loss;
    {
        const py::gil_scoped_release without_gil;
        Call call{{*x, *y, r, ry, self, count}, given, weights};
        call.save_for_backward = needs_gradient(call);
        if (x->is_cuda() && x->scalar_type() == at::kFloat) call.precision = cuda_precision();
        loss = std::get<0>(dispatch_pair_loss(call));
        // The op returns float32, or float64 of float64.
        if (loss.scalar_type() != x->scalar_type() && !at::autocast::is_autocast_enabled(x->device().type()))
            loss = loss.to(x->scalar_type());
    }
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(loss));
}

}  // namespace

void def_fast_path(py::module_& m) {
    m.def("fast_pair_loss", &PythonOp<&fast_pair_loss>::call,
          "pair_loss(*options, *batch) in the dtype that the embeddings ask for; None if the batch needs "
          "checks "
          "or conversion.");
}

}  // namespace dml
