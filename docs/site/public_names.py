"""References to a name of the package, wherever it is defined, lead to the public name's documentation."""

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

MODULES = ("dml_cuda", "dml_cuda.functional", "dml_cuda.custom", "dml_cuda.distributed")
# Not documented here: torch, Python, and the pytorch-metric-learning that dml_cuda.pml subclasses.
FOREIGN = ("torch", "typing", "typing_extensions", "collections", "os", "numpy", "pytorch_metric_learning")
FOREIGN_NAMES = {"Tensor", "nn.Module"}
INTERNAL = ("dml_cuda._", "dml_cuda.losses.", "dml_cuda.miners.")  # of annotations; no docstring spells them


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.Node | None:
    target = node["reftarget"]
    if node.get("refdomain") != "py":
        return None
    if target.split(".")[0] in FOREIGN or target in FOREIGN_NAMES:
        return content
    domain = env.domains["py"]
    name = target.rpartition(".")[2]
    for module in MODULES:
        if f"{module}.{name}" in domain.objects:
            arguments = (env, node["refdoc"], app.builder, "obj", f"{module}.{name}", node, content)
            return domain.resolve_xref(*arguments)
    return content if target.startswith(INTERNAL) else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
