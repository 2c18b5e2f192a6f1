"""A scene's recorded MJCF: renamed as the installed robosuite names it, and refused where building it could
read other files than robosuite's, or fill the memory: models come with datasets from anywhere."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

MAX_SIZE = 16 * 2**20
"""Characters of a model."""
MAX_COUNT = 4096
"""Of what makes a model large: a texture's or height field's side, copies of a body."""
COUNTS = ("width", "height", "nrow", "ncol", "count")


def parsed(model: str) -> ElementTree.Element:
    """A model's elements.

    Raises:
        ValueError: it isn't XML, too large, or defines entities.
    """
    if len(model) > MAX_SIZE:
        raise ValueError(f"the model has {len(model)} characters, over {MAX_SIZE}")
    if "<!" in re.sub(r"<!--.*?-->", "", model, flags=re.DOTALL):
        raise ValueError("the model declares a document type, which MJCF doesn't need")
    try:
        return ElementTree.fromstring(model)
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"the model isn't XML ({error})")


def require_own_files(model: str, assets: Path) -> None:
    """Raises ``ValueError`` where a model isn't XML, is too large, or names files outside of ``assets``."""
    for element in parsed(model).iter():
        if element.tag == "compiler" and element.get("strippath", "false") != "false":
            raise ValueError("the model strips its files of their folders: name them by their whole path")
        for name, value in element.attrib.items():
            if name.startswith("file") and not _is_within(value, assets):
                raise ValueError(f"the model names the file {value!r}, which isn't one of robosuite's assets")
            if name in COUNTS and any(not number <= MAX_COUNT for number in _numbers(value)):
                raise ValueError(f"the model has {name}={value!r}, over {MAX_COUNT}")


def _is_within(file: str, folder: Path) -> bool:
    """Whether a file has an absolute path that ends in a folder, also when ``..`` are followed."""
    path = Path(file)
    return "\0" not in file and path.is_absolute() and path.resolve().is_relative_to(folder.resolve())


def _numbers(text: str) -> list[float]:
    """Numbers in an attribute; NaN for what is none."""
    try:
        return [float(part) for part in text.split()]
    except ValueError:
        return [float("nan")]


def modern_model(model: str) -> str:
    """Renames the parts in a scene's MJCF, of any version, as robosuite does since 1.5: grippers belong to
    the right or left arm, and mounts are one kind of base.

    Raises:
        ValueError: it isn't XML.
    """
    if not re.search(r'name="gripper\d+_grip_site"', model):
        return model
    model = re.sub(r'"gripper(\d+)_', r'"gripper\1_right_', model)
    model = re.sub(r'"mount(\d+)_', r'"fixed_mount\1_', model)
    scene = parsed(model.replace("/robosuite/models/assets/mounts/", "/robosuite/models/assets/bases/"))
    bodies = {body.get("name", ""): body for body in scene.iter("body")}
    for name in [name for name in bodies if re.fullmatch(r"robot\d+_base", name)]:
        # 1.5 looks for a site where an arm is mounted.
        foot = bodies.get(name.replace("base", "link0"), bodies[name])
        ElementTree.SubElement(foot, "site", name=name.replace("base", "right_center"), size="0.01")
    return ElementTree.tostring(scene, encoding="unicode")
