"""The generated files are those of the proto, and the numbers are those of every other layer."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2

from proteus_fast import Status
from proteus_server import client
from proteus_server import proteus_pb2 as pb

SERVER = Path(__file__).resolve().parents[2] / "server"
GENERATED = ("proteus_pb2.py", "proteus_pb2.pyi", "proteus_pb2_grpc.py")


def generate(out: Path) -> None:
    pytest.importorskip("grpc_tools", reason="needs grpcio-tools")
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{SERVER}", f"--python_out={out}", f"--pyi_out={out}"]
    command += [f"--grpc_python_out={out}", f"--descriptor_set_out={out / 'set'}", "proteus_server/proteus.proto"]
    subprocess.run(command, check=True, timeout=60)


def test_the_generated_files_are_those_of_the_proto(tmp_path: Path) -> None:
    generate(tmp_path)
    files = descriptor_pb2.FileDescriptorSet.FromString((tmp_path / "set").read_bytes())
    committed = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(committed)
    # json_name is filled in by the compiler for descriptor sets only
    for message in files.file[0].message_type:
        # a map's entries are a message inside
        for field in (*message.field, *(field for entry in message.nested_type for field in entry.field)):
            field.ClearField("json_name")
    assert files.file[0] == committed


def test_the_generated_files_are_byte_for_byte_those_of_the_same_generator(tmp_path: Path) -> None:
    generate(tmp_path)
    made_with = re.search(
        r"GRPC_GENERATED_VERSION = '([\d.]+)'", (SERVER / "proteus_server" / GENERATED[2]).read_text()
    )
    assert made_with is not None
    if made_with[1] != metadata.version("grpcio-tools"):
        pytest.skip(f"needs grpcio-tools {made_with[1]}, which generated the committed files")
    for name in GENERATED:
        assert (tmp_path / "proteus_server" / name).read_bytes() == (SERVER / "proteus_server" / name).read_bytes(), (
            name
        )


def test_the_zero_of_every_enum_is_unspecified() -> None:
    for name, enum in pb.DESCRIPTOR.enum_types_by_name.items():
        assert enum.values[0].name == f"{name.upper()}_UNSPECIFIED"
        assert enum.values[0].number == 0


def test_statuses_have_one_number_everywhere() -> None:
    wire = {name.removeprefix("STATUS_"): number for name, number in pb.Status.items()}
    assert wire == {status.name: status.value for status in Status}
    assert wire == {status.name: status.value for status in client.Status}


def test_the_services_are_those_of_the_contract() -> None:
    methods = {
        service.full_name: [method.name for method in service.methods]
        for service in pb.DESCRIPTOR.services_by_name.values()
    }
    assert methods == {
        "proteus.v1.RouterService": ["Route", "RouteBatch", "Explain", "ReportOutcome", "GetInfo"],
        "proteus.v1.AdminService": ["Reload", "SetPrices", "SetAvailability", "GetPolicy"],
    }


@pytest.mark.parametrize("name", ["RouteRequest", "RouteBatchRequest"])
def test_numbers_of_the_contract_never_move(name: str) -> None:
    fields = {field.name: field.number for field in pb.DESCRIPTOR.message_types_by_name[name].fields}
    if name == "RouteRequest":
        contract = {"text": 1, "embedding": 2, "tau": 3, "available": 4, "strict": 5, "mode": 6, "guarantee": 7}
    else:
        contract = {
            "texts": 1,
            "embeddings": 2,
            "rows": 3,
            "tau": 4,
            "available": 5,
            "strict": 6,
            "mode": 7,
            "guarantee": 8,
        }
    assert fields == contract
