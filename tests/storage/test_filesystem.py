"""The system calls behind a checkpoint."""

from qloop.storage.filesystem import FileSystem


def test_all_bytes_of_wide_items_are_written(tmp_path):
    content = memoryview(bytes((1 << 22) + 400)).cast("f")
    disk = FileSystem()
    descriptor = disk.create(tmp_path / "file")
    disk.append(descriptor, content)
    disk.close(descriptor)
    assert (tmp_path / "file").stat().st_size == (1 << 22) + 400
