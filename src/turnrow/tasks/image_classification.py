"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from turnrow.errors import UserError
from turnrow.tasks.classes import ClassTask
from turnrow.tasks.columns import check_name, require_columns
from turnrow.tasks.images import FILES, image_files, open_image

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ImageClassificationTask"]


@dataclass(kw_only=True)
class ImageClassificationTask(ClassTask):
    """One of the labels that the training split has, for an image.

    Images are read and prepared batch by batch, as the model's image processor does it, in RGB and without augmentation; what is
    encoded are their files.

    Metrics: see `ClassTask`.
    """

    name: ClassVar[str] = "image_classification"
    preparer: ClassVar[str] = "AutoImageProcessor"
    auto_model = "AutoModelForImageClassification"
    # peft has none for images; it then hands on whatever inputs the model takes.
    peft_task_type = None

    image: str = "image"
    """The column of the image: a path, the bytes of a file, or an image of Pillow."""
    folder: str | None = None
    """Where relative paths begin; None: the current folder, and the folder of the data file for what is not there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_name(self.image, "image")
        if self.image == self.label:
            raise UserError(f"options 'image' and 'label' must name different columns, got {self.image!r} twice")
        if self.folder is not None and not isinstance(self.folder, str):
            raise UserError(f"option 'folder' must be the path of a folder, got {self.folder!r}")

    def columns(self) -> list[str]:
        """Return the columns of the image and of the label."""
        return [self.image, self.label]

    def input_columns(self) -> list[str]:
        """The image."""
        return [self.image]

    def encode(self, data: Dataset, tokenizer: Any, max_length: int | None = None, *, split: str) -> Dataset:
        """Return the images' files as `pixel_values`, which the collator reads, and the labels; see `Task.encode`."""
        labelled = split != "predict"
        require_columns(data, self.columns() if labelled else self.input_columns(), split)
        encoded = image_files(data, self.image, split, self.folder)
        if labelled:
            encoded = encoded.add_column("labels", self._encode_labels(data, split))
        encoded.info.dataset_name = data.info.dataset_name
        return encoded

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
        """Return a collator that reads the images of a batch and prepares them by the image processor `tokenizer`."""

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            import torch

            images = [open_image(row[FILES]) for row in rows]
            batch = dict(tokenizer(images=images, return_tensors="pt"))
            if "labels" in rows[0]:
                batch["labels"] = torch.tensor([row["labels"] for row in rows], dtype=torch.long)
            return batch

        return collate
