"""The name of an architecture: `resnet18`, `torchvision:NAME`, `timm:NAME`, or code, `module:callable`."""

LIBRARIES = ("torchvision", "timm")


def is_code(arch: str) -> bool:
    """Whether it is `module:callable`, which is run, not a name of ours or of a library."""
    return ":" in arch and arch.partition(":")[0] not in LIBRARIES
