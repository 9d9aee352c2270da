"""What VDIs, snapshots and clusters may be called, and other limits of what a user may ask for."""

from __future__ import annotations

from collections.abc import Mapping

from sheepfs.core.clustermap import MAX_COPIES
from sheepfs.core.errors import UsageError
from sheepfs.core.geometry import MAX_VDI_SIZE

MAX_NAME_BYTES = 128
MAX_TAG_BYTES = 64
MAX_ATTRIBUTES_BYTES = 4096
"""All attributes of a VDI or snapshot together, names and values."""


def check_cluster_name(name: str) -> None:
    """Refuse cluster names that cannot be part of a key (UsageError)."""
    if (
        not name
        or len(name) > 64
        or not all(c.isascii() and (c.isalnum() or c in "-_.") for c in name)
    ):
        raise UsageError(f"cluster name {name!r}: use 1 to 64 letters, digits, '-', '_' or '.'")


def check_vdi_name(name: str) -> None:
    """Refuse VDI names that cannot be a file name in the mount (UsageError)."""
    size = len(name.encode(errors="surrogateescape"))
    if not 1 <= size <= MAX_NAME_BYTES:
        raise UsageError(f"VDI name of {size} bytes: use 1 to {MAX_NAME_BYTES}")
    if name.startswith("."):
        raise UsageError(f"VDI name {name!r} starts with a dot")
    if "@" in name:
        raise UsageError(f"VDI name {name!r}: '@' is reserved for snapshots")
    if "/" in name or not name.isprintable():
        raise UsageError(f"VDI name {name!r} has a '/' or a character that cannot be printed")


def check_tag(tag: str) -> None:
    """Refuse snapshot tags that cannot be part of a file name in the mount (UsageError)."""
    size = len(tag.encode(errors="surrogateescape"))
    if not 1 <= size <= MAX_TAG_BYTES:
        raise UsageError(f"snapshot tag of {size} bytes: use 1 to {MAX_TAG_BYTES}")
    if tag.startswith((".", "-")) or "@" in tag or "/" in tag or not tag.isprintable():
        raise UsageError(
            f"snapshot tag {tag!r}: no '@', '/' or control characters, no '.' or '-' in front"
        )
    if tag.endswith(".raw"):
        # `t.raw` of a VDI `vm1` and `t` of `vm1.raw` would be one file in the mount.
        raise UsageError(f"snapshot tag {tag!r}: leave out the .raw")


def check_attributes(attributes: Mapping[str, str]) -> None:
    """Refuse attributes that do not fit in a record (UsageError)."""
    for name in attributes:
        if not name or len(name) > 200 or not name.isprintable():
            raise UsageError(f"attribute name {name!r}: use 1 to 200 printable characters")
    size = sum(len(k.encode(errors="surrogateescape")) for pair in attributes.items() for k in pair)
    if size > MAX_ATTRIBUTES_BYTES:
        raise UsageError(
            f"attributes of {size} bytes: all together may have {MAX_ATTRIBUTES_BYTES}"
        )


def check_vdi_size(size_bytes: int) -> None:
    """Refuse sizes that a VDI cannot have (UsageError)."""
    if not 0 <= size_bytes <= MAX_VDI_SIZE:
        raise UsageError(f"size of {size_bytes} bytes: a VDI has 0 to {MAX_VDI_SIZE} (1 PiB)")


def check_copies(copies: int) -> None:
    """Refuse numbers of copies that no pool can have (UsageError)."""
    if not 1 <= copies <= MAX_COPIES:
        raise UsageError(f"{copies} copies: a VDI has 1 to {MAX_COPIES}")


def full_name(name: str) -> str:
    """Give the name in the mount for a name from the command line: `vm1` means `vm1.raw`."""
    return name if name.endswith(".raw") else name + ".raw"


def snapshot_file(name: str, tag: str) -> str:
    """Give the file name of a snapshot: `daily` of `vm1.raw` is `vm1@daily.raw`."""
    stem, suffix = (name[:-4], ".raw") if name.endswith(".raw") else (name, "")
    return f"{stem}@{tag}{suffix}"


def split_name(text: str) -> tuple[str, str]:
    """Give (VDI, tag) for a file name in the mount; the tag is empty for a VDI's own name.

    `vm1@daily.raw` is (`vm1.raw`, `daily`), and so is `vm1.raw@daily`.
    """
    stem, at, tag = text.partition("@")
    if not at:
        return text, ""
    if tag.endswith(".raw"):
        return stem + ".raw", tag[:-4]
    return stem, tag
