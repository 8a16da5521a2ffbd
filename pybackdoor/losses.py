"""ContrastiveLoss: open_clip's ClipLoss on pybackdoor's kernels."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import contrastive_par


class ContrastiveLoss(nn.Module):
    """CLIP's symmetric contrastive loss: a drop-in for ``open_clip.ClipLoss``, for any training.

    The same call, meaning and value, without a matrix of logits in memory; features are used as
    they are given. With ``world_size`` > 1 the loss is that of the batch of all ranks, as with
    ``gather_with_grad=True``: each rank passes its own features, and under the mean that
    DistributedDataParallel takes, the gradients are those of one process with the whole batch.
    Half the bytes of open_clip's scheme travel.

    Args:
        world_size: ranks of the default process group that share the loss.
        precision: of the matrix products, see ``pybackdoor.ops.contrastive_par``.
    Example:
        >>> loss = ContrastiveLoss()
        >>> x = torch.eye(4)
        >>> loss(x, x, torch.tensor(10.0)) < 1e-3
        tensor(True)
    """

    def __init__(self, *, world_size: int = 1, precision: str = "auto") -> None:
        super().__init__()
        self.world_size, self.precision = world_size, precision

    def forward(
        self,
        image_features: Tensor,  # [N, D]
        text_features: Tensor,  # [N, D]
        logit_scale: Tensor,  # [] exp of the learned parameter
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, []; in a dict under "contrastive_loss" with output_dict.

        A logit_bias, the same for all pairs, changes neither the loss nor a gradient of it.

        Raises:
            TypeError, ValueError: naming the argument, what was wanted and what came.
        """
        counts = [len(image_features)] * self.world_size if self.world_size > 1 else None
        loss = contrastive_par(
            text_features, image_features, logit_scale, normalize=False,
            precision=self.precision, counts=counts,
        ).loss  # fmt: skip
        if counts:  # the ranks' gradients add up to the whole one; their mean is taken
            loss = loss.detach() + self.world_size * (loss - loss.detach())
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()  # a gradient of 0, which DDP waits for
        return {"contrastive_loss": loss} if output_dict else loss

    def extra_repr(self) -> str:
        return f"world_size={self.world_size}, precision={self.precision!r}"
