"""Tests of the kernel room, file by file."""
