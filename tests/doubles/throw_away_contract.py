"""A contract that nobody has written anything for, beside the platform's own."""

import subprocess
import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

from aiaas.type.v1 import options_pb2

_ROOT = Path(options_pb2.__file__).parents[5]

THROW_AWAY = """
syntax = "proto3";
package thrown.away.v1;
import "aiaas/type/v1/options.proto";
import "google/protobuf/field_mask.proto";
import "google/protobuf/timestamp.proto";
// Things of all kinds.
service ThingService {
  // Changes a thing. And more is said.
  rpc UpdateThing(UpdateThingRequest) returns (UpdateThingResponse) {
    option (aiaas.type.v1.policy) = {
      permission: "things.update"
      rest: {verb: "PATCH" path: "/admin/v1/things/{thing_id}" body: "thing"}
    };
  }
  // Follows things.
  rpc WatchThings(WatchThingsRequest) returns (stream Thing) {
    option (aiaas.type.v1.policy) = {public: true rest: {verb: "GET" path: "/admin/v1/things"}};
  }
}
// How a thing is.
enum Mood {
  // Never sent.
  MOOD_UNSPECIFIED = 0;
  // Well.
  MOOD_WELL = 1;
}
// A thing.
message Thing {
  // Its name, for example "spoon".
  string name = 1;
  // How much it weighs. Output only.
  int64 weight_grams = 2;
  // Which of the two.
  oneof kind {
    // Round.
    bool round = 3;
    // Square.
    Mood square = 4;
  }
  // By colour.
  map<string, int32> counts = 5;
  // Of which it is made.
  repeated Thing parts = 6;
  // When.
  google.protobuf.Timestamp create_time = 7;
  // For people.
  string etag = 8;
  // A word.
  string word = 9 [debug_redact = true];
}
// Changes a thing.
message UpdateThingRequest {
  // Which.
  string thing_id = 1;
  // New values.
  Thing thing = 2;
  // Which fields.
  google.protobuf.FieldMask update_mask = 3;
  // Said again.
  string request_id = 4;
}
// The thing.
message UpdateThingResponse {
  // As stored.
  Thing thing = 1;
}
// Asks.
message WatchThingsRequest {
  // Which.
  Filter filter = 1;
  // In words.
  message Filter {
    // How they are.
    repeated Mood moods = 1;
    // How old.
    uint32 days = 2;
  }
}
"""


def compiled(folder: Path, text: str) -> bytes:
    """The descriptor set of one contract and of what it imports, with comments; `folder` is for what is written."""
    (folder / "thing.proto").write_text(text)
    # In a process of its own: the compiler keeps what it has read.
    arguments = [f"-I{folder}", f"-I{_ROOT / 'proto'}", "--include_imports", "--include_source_info"]
    arguments += [f"--descriptor_set_out={folder / 'set.binpb'}", "thing.proto"]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", *arguments], check=True)
    return (folder / "set.binpb").read_bytes()


def with_throw_away(folder: Path) -> bytes:
    """The descriptor set of `gen/` as `make generate` would have made it with this contract in `proto/`; `folder` is
    for what is written on the way."""
    described = FileDescriptorSet.FromString(compiled(folder, THROW_AWAY))
    contracts = FileDescriptorSet.FromString((_ROOT / "gen/descriptors.binpb").read_bytes())
    known = {file.name for file in contracts.file}
    contracts.file.extend(file for file in described.file if file.name not in known)
    return contracts.SerializeToString()
