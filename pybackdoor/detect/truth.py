"""Which pairs are poisoned, when a manifest says so."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ..data import Overlay, Pairs, Strings
from ..data.store import attempt
from ..manifest import Manifest, image_sha256
from ..triggers import apply_trigger

_AT_ONCE = 256  # images held while their hashes are taken


def planted(pairs: Pairs, manifest: Manifest) -> tuple[Pairs, np.ndarray]:
    """The pairs as a model was poisoned with them, and which of them are poisoned.

    ``poison`` plants in memory and writes no images. So samples of the manifest whose images are
    clean here get trigger and caption again; the manifest's hash of every poisoned image must
    come out.

    Args:
        pairs: those that were poisoned, or what is left of them.
        manifest: of what was planted.
    Returns:
        The pairs, the same object when all samples carry their poison already, and [N] bool.
    Raises:
        ValueError: another image size, no sample of the manifest among the pairs, or a sample
            whose image is not the one that was poisoned.
    """
    if tuple(pairs.images.image_size) != tuple(manifest.image_size):
        raise ValueError(
            f"planted: pairs must be of the manifest's size {manifest.image_size}, got "
            f"{pairs.images.image_size}"
        )
    row_of = {int(id): row for row, id in enumerate(pairs.ids)}
    samples = {row_of[s.id]: s for s in manifest.samples if s.id in row_of}
    if not samples:
        raise ValueError(
            f"planted: none of the manifest's {len(manifest.samples)} samples is among the "
            f"{len(pairs)} pairs: it must be the manifest of these pairs"
        )
    truth = np.zeros(len(pairs), bool)
    patches: dict[int, np.ndarray] = {}
    wanted = np.array(sorted(samples))
    truth[wanted] = True
    for start in range(0, len(wanted), _AT_ONCE):
        rows = wanted[start : start + _AT_ONCE]
        images, broken = attempt(pairs.images, rows)
        stamped = apply_trigger(images, manifest.spec, pairs.ids[rows])
        for at, row in enumerate(rows.tolist()):
            hashed = samples[row].sha256
            if at in broken or image_sha256(images[at]) == hashed:
                continue
            if image_sha256(stamped[at]) != hashed:
                raise ValueError(
                    f"planted: the image of pair {row} ({pairs.locations[row]}) must be the one "
                    f"that the manifest's sample {samples[row].id} ({samples[row].location}) "
                    "was made of, got another: it has changed, or is resized differently"
                )
            patches[row] = stamped[at]
    captions = {
        row: sample.new_caption
        for row, sample in samples.items()
        if pairs.captions[row] != sample.new_caption
    }
    if not patches and not captions:
        return pairs, truth
    return replace(
        pairs, images=Overlay(pairs.images, patches),
        captions=Strings.of(pairs.captions).replaced(captions),
    ), truth  # fmt: skip
