"""Augmentations of demonstrations, by name; users register their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Registry

if TYPE_CHECKING:
    from ..data.replay_buffer import Augment

AUGMENTATIONS: Registry[Augment] = Registry("augmentation", {})
"""Each makes a second episode of a recorded one; the command line adds those of its tasks."""
