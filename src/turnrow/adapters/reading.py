"""Read an adapter folder as data: safetensors and JSON only, everything checked before anything is used."""

from __future__ import annotations

import os

from turnrow.adapters.adapter_file import AdapterFile
from turnrow.adapters.checks import check_against_config
from turnrow.adapters.folder import adapter_folder, read_config, read_tensors
from turnrow.adapters.manifest import read_manifest, verify_weights_file

__all__ = ["read_adapter"]


def read_adapter(path: str | os.PathLike[str]) -> AdapterFile:
    """Read the adapter in a folder and check that it is whole and consistent with itself. No code in it is ever run.

    Args:
        path: a folder in peft's layout, with or without ``turnrow.json``.

    Raises:
        AdapterError: the folder, the configuration or the weights are missing or unusable; the weights are a pickle file;
            the file is truncated or altered (against ``turnrow.json``); a tensor does not fit the configuration.
    """
    folder = adapter_folder(path)
    config = read_config(folder)
    manifest = read_manifest(folder)
    if manifest is not None:
        verify_weights_file(folder, manifest)
    adapter = AdapterFile(folder, config, read_tensors(folder), manifest)
    check_against_config(adapter)
    return adapter
