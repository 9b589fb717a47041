"""tests/benchmarks/gpu_wheels.py: what it packs, and what it refuses. Nothing is fetched."""

import base64
import csv
import hashlib
import io
import zipfile

import pytest
from packaging.requirements import Requirement

from benchmarks import gpu_wheels

LIBRARIES = ("cpu", "cuda118", "cuda130", "rocm70")


def write_wheel(folder, name="bitsandbytes", requires=(), libraries=()):
    """Write a wheel with these requirements and native libraries; its RECORD has no hashes."""
    info = f"{name}-1.0.dist-info"
    needed = "".join(f"Requires-Dist: {line}\n" for line in requires)
    files = {
        f"{name}/__init__.py": "",
        **{f"{name}/libbitsandbytes_{library}.so": library * 1000 for library in libraries},
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needed}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(file, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{file},{_hash(files[file])},\n" for file in files))
    return path


def _hash(content):
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content.encode()).digest()).decode().rstrip("=")


def test_slim_bitsandbytes_keeps_two_libraries_and_a_record_that_verifies(tmp_path):
    wheel = write_wheel(tmp_path, libraries=LIBRARIES)
    gpu_wheels.slim_bitsandbytes(wheel, "130")
    assert [path.name for path in tmp_path.iterdir()] == [wheel.name]
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = list(csv.reader(io.StringIO(archive.read("bitsandbytes-1.0.dist-info/RECORD").decode())))
        hashed = {name: digest for name, digest, _ in record if not name.endswith("/RECORD")}
        assert all(digest == _hash(archive.read(name).decode()) for name, digest in hashed.items())
    assert hashed.keys() == names - {"bitsandbytes-1.0.dist-info/RECORD"}
    assert {name for name in names if name.endswith(".so")} == {
        "bitsandbytes/libbitsandbytes_cpu.so",
        "bitsandbytes/libbitsandbytes_cuda130.so",
    }


def test_slim_bitsandbytes_refuses_a_cuda_version_without_a_library(tmp_path):
    wheel = write_wheel(tmp_path, libraries=LIBRARIES)
    with pytest.raises(SystemExit, match=r"has no libbitsandbytes_cuda99\.so; give another --cuda"):
        gpu_wheels.slim_bitsandbytes(wheel, "99")
    assert wheel.exists()


def test_require_size_names_the_largest_files(tmp_path):
    for name, size in {"small": 1000, "large": 3000, "middle": 2000}.items():
        (tmp_path / name).write_bytes(bytes(size))
    assert gpu_wheels.require_size(tmp_path, 0.006) == pytest.approx(0.006)
    with pytest.raises(SystemExit, match=r"the limit is 0\.005 MB; the largest: large .*, middle .*, small"):
        gpu_wheels.require_size(tmp_path, 0.005)


def test_require_complete_evaluates_conditions_for_the_machine(tmp_path):
    needed = ["other>=1", 'old; python_version < "3.12"', 'extra; extra == "all"', "torch>=2.6"]
    write_wheel(tmp_path, requires=needed)
    write_wheel(tmp_path, name="other")
    gpu_wheels.require_complete(tmp_path, {"torch": "2.11.0"}, "3.12")
    with pytest.raises(SystemExit, match=r"bitsandbytes needs old; .*; bitsandbytes needs torch>=2\.6; run this"):
        gpu_wheels.require_complete(tmp_path, {"torch": "2.1.0"}, "3.11")


def test_constraints_take_the_versions_of_the_machine():
    found = gpu_wheels.constraints({"torch": "2.11.0"})
    assert found["torch"] == "2.11.0" and found["deepspeed"].startswith("0.19")


def test_requirements_have_what_the_pieces_need():
    names = {Requirement(line).name for line in gpu_wheels.requirements()}
    assert {"transformers", "deepspeed", "h5py", "bitsandbytes", "liger-kernel", "pytest", "pytest-timeout"} <= names
