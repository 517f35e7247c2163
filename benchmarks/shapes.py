"""Shapes of window attention in published models, as the cases that the tests draw inputs for."""

from __future__ import annotations

import dataclasses

from swinkernels.testing import WindowAttentionCase

Case = WindowAttentionCase


def _stages(batch: int, heads: int, window: int, first: int, **options: bool) -> list[Case]:
    """The four stages of a classifier: the map halves, the heads double; a map of one window is not shifted."""
    return [
        Case(batch, (size, size), heads << i, 32, window, window // 2 if size > window else 0, **options)
        for i in range(4)
        for size in [first >> i]
    ]


# The first is the one that the goals of the project are stated for.
ATTENTION: dict[str, Case] = {
    **{f"swin_t.{i}": case for i, case in enumerate(_stages(128, 3, 7, 56), 1)},
    "window8.1": Case(64, (64, 64), 3, 32, 8, 4),
    **{f"swin_b.{i}": case for i, case in enumerate(_stages(128, 4, 7, 56), 1)},
    **{f"swin_b384.{i}": case for i, case in enumerate(_stages(32, 4, 12, 96), 1)},
    **{f"swinv2_t.{i}": case for i, case in enumerate(_stages(64, 3, 8, 64, has_logit_scale=True), 1)},
    "swinv2_t_w16.1": Case(64, (64, 64), 3, 32, 16, 8, has_logit_scale=True),
    # Detection: 800 x 1216 pixels, padded to whole windows, pad tokens holding the bias of the QKV Linear.
    "detection.1": Case(2, (200, 304), 3, 32, 7, 3, has_pad_qkv=True),
    "restoration": Case(8, (64, 64), 6, 32, 16, 8),
    "batch1.1": Case(1, (56, 56), 3, 32, 7, 3),
    "batch1.3": Case(1, (14, 14), 12, 32, 7, 3),
    "head_dim16": Case(64, (56, 56), 6, 16, 7, 3),
    "head_dim64": Case(64, (56, 56), 2, 64, 7, 3),
}
QUICK = ("swin_t.1", "swin_t.2", "swin_t.3", "swin_t.4", "window8.1")
GOAL = "swin_t.1"


def with_batch(case: Case, batch: int) -> Case:
    return dataclasses.replace(case, batch=min(case.batch, batch))
