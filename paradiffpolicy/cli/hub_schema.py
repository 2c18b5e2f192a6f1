"""Settings of the commands that speak to the Hugging Face Hub."""

from __future__ import annotations

from dataclasses import dataclass

from .parts import CommandConfig
from .settings import out_setting, path_setting, setting


@dataclass
class PushConfig(CommandConfig):
    """Uploads a checkpoint to the Hugging Face Hub, with a model card that shows its report. It prints the
    files, their sizes and where they go before it uploads them: the policy, its students, the card.

    Examples:
      paradiffpolicy push checkpoint=outputs/train/reach/checkpoint repo=me/reach
          to a public repository
      paradiffpolicy push checkpoint=outputs/train/reach/checkpoint repo=me/reach private=true license=mit
          to a private one, under a license
      paradiffpolicy push checkpoint=outputs/train/reach/checkpoint repo=me/reach card=false
          without a change to the card that is there
    """

    checkpoint: str | None = path_setting(None, "a policy's folder")
    repo: str | None = setting(None, "repository on the Hub, as OWNER/NAME; it is made if there is none")
    private: bool = setting(False, "whether it must be private")
    license: str | None = setting(None, "license that the card names, as mit; null: none")
    card: bool = setting(True, "whether the card, README.md, is written anew; false: it stays as it is there")


@dataclass
class PullConfig(CommandConfig):
    """Downloads a checkpoint from the Hugging Face Hub to a new folder: one of ours, LeRobot's or
    diffusion_policy's. Half of one is never written.

    Examples:
      paradiffpolicy pull repo=me/reach out=checkpoints/reach
          the newest revision
      paradiffpolicy pull repo=me/reach@v1.0 out=checkpoints/reach
          another one
      paradiffpolicy pull repo=me/run/checkpoints/latest.ckpt out=checkpoints/theirs
          diffusion_policy's, where a repository has several
    """

    repo: str | None = setting(None, "on the Hub: OWNER/NAME, OWNER/NAME@REVISION or OWNER/NAME/FILE.ckpt")
    out: str | None = out_setting(None, "folder to write; must not exist")
