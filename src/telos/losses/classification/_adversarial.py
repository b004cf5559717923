"""The row contract of losses that see the logits of a perturbed input."""

from torch import Tensor

from telos.losses._algebra import ClassificationLoss
from telos.losses._reduction import Denominator, classification_rows, reduce


class AdversarialRowsLoss(ClassificationLoss):
    """A row-wise loss that sees the logits of a perturbed input beside those of the clean one."""

    needs = frozenset({"adversarial_logits"})

    def _formula(self, logits: Tensor, target: Tensor, adversarial_logits: Tensor) -> Tensor:
        """The value of each row, as :func:`telos.losses.classification_rows` asks for it."""
        raise NotImplementedError(f"{type(self).__name__} must define _formula")

    def rows(  # type: ignore[override]
        self,
        logits: Tensor,
        target: Tensor,
        *,
        adversarial_logits: Tensor,
        sample_weight: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One value and one weight per example, each of the shape of the batch."""
        return classification_rows(
            self._formula,
            logits,
            target,
            class_weight=self.class_weight,
            sample_weight=sample_weight,
            ignore_index=self.ignore_index,
            companions={"adversarial_logits": adversarial_logits},
        )

    def forward(  # type: ignore[override]
        self,
        logits: Tensor,
        target: Tensor,
        *,
        adversarial_logits: Tensor,
        sample_weight: Tensor | None = None,
        denominator: Denominator = None,
    ) -> Tensor:
        """The reduced loss; see :func:`telos.losses.reduce` for ``denominator``."""
        values, weights = self.rows(
            logits, target, adversarial_logits=adversarial_logits, sample_weight=sample_weight
        )
        return reduce(values, weights, self.reduction, denominator)
