"""Methods of the SAM family that are not part of the package: examples for docs/writing-a-method.md."""
