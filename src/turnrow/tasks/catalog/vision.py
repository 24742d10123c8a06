"""Images to be classified, and to be spoken about."""

from __future__ import annotations

from turnrow.tasks.catalog.entry import Entry

__all__ = ["ENTRIES"]


def _splits(name: str) -> dict[str, str]:
    return {"train": f"{name}::train[:90%]", "validation": f"{name}::train[90%:]", "test": f"{name}::test"}


_CIFAR = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"

ENTRIES = (
    Entry(
        name="cifar10",
        title="CIFAR-10: which of ten things is in the picture of 32 x 32 pixels?",
        task={"name": "image_classification"},
        hub=_splits("uoft-cs/cifar10"),
        columns={"img": "image"},
        source=_CIFAR,
    ),
    Entry(
        name="cifar100",
        title="CIFAR-100: which of a hundred things is in the picture of 32 x 32 pixels?",
        task={"name": "image_classification"},
        hub=_splits("uoft-cs/cifar100"),
        columns={"img": "image", "fine_label": "label"},
        source=_CIFAR,
        notes="The hundred fine classes.",
    ),
    Entry(
        name="llava_instruct",
        title="LLaVA-Instruct-150K: conversations about pictures of COCO",
        task={"name": "visual_instruction"},
        source="Liu et al. 2023, NeurIPS (LLaVA)",
        notes=(
            "Local files alone: llava_instruct_150k.json of the hub's liuhaotian/LLaVA-Instruct-150K has the names of pictures of COCO "
            "train2017, which are had from COCO. Cut it into splits, and let task.folder be the folder of the pictures."
        ),
    ),
)
