"""How the files of a run directory are written: a line whole or not at all, a file the old one or the new one."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlvr.errors import RunError

CONTROL = "control:"  # and its name: the column of what a control decided of a token

# Fixed types, so that the files of a run can be read as one table even where a column is all None.
_ROW_TYPES = {
    **dict.fromkeys(("step", "sequence", "prompt_index"), "int64"),
    **dict.fromkeys(("reward", "advantage"), "float64"),
    **dict.fromkeys(("prompt", "completion", "estimator"), "string"),
}
_TOKEN_TYPES = {
    **dict.fromkeys(("entropy", "logps", "old_logps", "rollout_logps", "ref_logps", "weight", "drift"), "float32"),
    **dict.fromkeys(("covariance", "predicted"), "float32"),
    **{"token_ids": "int64", "tokens": "string", "keep": "bool"},
}


def append(path: Path, line: bytes) -> None:
    """Add a line that is on disk when this returns. Raises: RunError if it cannot be; then nothing of it is there."""
    with _told(path), open(path, "ab", buffering=0) as file:
        before = file.tell()
        try:
            left = memoryview(line)
            while left:
                left = left[file.write(left) :]
            os.fsync(file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def replace(path: Path, content: bytes) -> None:
    """Write a file whole: a kill leaves the old one or the new one. Raises: RunError, and leaves the old one."""
    with _aside(path) as partial, open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """A table, whole as in `replace`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {}
    for name, values in columns.items():
        kind = None
        if name in _ROW_TYPES:
            kind = pa.type_for_alias(_ROW_TYPES[name])
        elif name in _TOKEN_TYPES or name.startswith(CONTROL):
            kind = pa.list_(pa.type_for_alias(_TOKEN_TYPES.get(name, "bool")))
        arrays[name] = pa.array([_encodable(value) for value in values], type=kind)
    with _aside(path) as partial:
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table(arrays), partial, compression="zstd")


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    partial = path.with_name(path.name + ".partial")
    with _told(path):
        try:
            yield partial
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{str(path)!r} could not be written ({type(error).__name__}: {error}); no record is torn: repair that "
            "(free space?) and go on with --resume_from_checkpoint"
        ) from error


def _encodable(value: Any) -> Any:
    """Half of a surrogate pair, which a tokenizer can produce, has no UTF-8: it becomes a question mark."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
        return [_encodable(entry) for entry in value]
    return value
