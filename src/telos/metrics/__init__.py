"""Look at what was learnt: diagnostics in the style of torchmetrics, which this room needs."""

try:
    import torchmetrics  # noqa: F401
except ImportError as error:
    raise ImportError("telos.metrics needs torchmetrics: pip install 'telos[metrics]'") from error

from telos.metrics.stability import SoftmaxCollapse, nlm_alignment, softmax_collapse, zero_term_fraction

__all__ = ["SoftmaxCollapse", "nlm_alignment", "softmax_collapse", "zero_term_fraction"]
