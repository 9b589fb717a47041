"""Archives of a folder's files, plain and odd ones."""

import io
import tarfile
import zipfile


def make_zip(path, folder, prefix="", compression=zipfile.ZIP_STORED):
    """Zip the files of a folder."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


def make_tar(path, folder, prefix="", kind=tarfile.PAX_FORMAT, mode="w"):
    """Tar a folder."""
    with tarfile.open(path, mode, format=kind) as archive:
        archive.add(folder, prefix or ".")
    return path


def tar_of(path, *members):
    """Tar of (name, bytes) pairs, or of TarInfo objects."""
    with tarfile.open(path, "w") as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return path


def zip_of(path, *members):
    """Zip of (name, bytes) pairs; a name may be bytes, which are written without the UTF-8 flag."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            info = _RawInfo(name) if isinstance(name, bytes) else zipfile.ZipInfo()
            if not isinstance(name, bytes):
                info.filename = name  # as it is: ZipInfo's constructor changes separators
            archive.writestr(info, data)
    return path


class _RawInfo(zipfile.ZipInfo):
    def __init__(self, raw):
        super().__init__()
        self._raw, self.filename = raw, raw.decode("latin-1")

    def _encodeFilenameFlags(self):
        return self._raw, self.flag_bits
