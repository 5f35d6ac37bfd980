"""Writing manifests row by row, so that an interrupted run can resume."""

import json
import os
from pathlib import Path


def finished_rows(manifest: Path) -> dict[str, dict]:
    """The rows that an earlier run wrote to a manifest, by id, none without one; half a line at its end is removed."""
    if not manifest.exists():
        return {}
    written = manifest.read_bytes()
    whole = written[: written.rfind(b"\n") + 1]
    if whole != written:
        manifest.write_bytes(whole)
    return {str(row["id"]): row for row in map(json.loads, whole.splitlines())}


def write_row(file, row: dict, folder: Path):
    """
    Write a row of `data.manifest_rows` as a line, at once.

    Args:
        file: open for writing text. folder (`Path`): that paths of recordings in the manifest are relative to.
    """
    row = {name: value for name, value in row.items() if name != "where"}
    row["audio"] = os.path.relpath(row["audio"], folder)
    print(json.dumps(row, ensure_ascii=False), file=file, flush=True)
