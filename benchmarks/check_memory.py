"""Memory and time of `check` on a large JSON file, which is made and removed again.

    python benchmarks/check_memory.py [records=1000000] [words=280] [folder=/tmp]

A million records of 280 words are 1.5 GB. They share a thousand pictures, and one in a thousand has
none. Prints what `check` says, its peak of memory and its time.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

IMAGES = 1000
WORDS = (
    "a the red blue small large block ball left right of under above stands lies on table".split()
)


def write_records(file: Path, count: int, words: int) -> None:
    """Write a list of records, one at a time."""
    with file.open("w") as stream:
        stream.write("[")
        for number in range(count):
            first = number * 7919
            text = " ".join(WORDS[(first + n * n) % len(WORDS)] for n in range(words))
            turns = [
                {"from": "human", "value": f"<image>\nWhat is in picture {number}?"},
                {"from": "gpt", "value": text},
            ]
            image = "gone.png" if number % 1000 == 999 else f"{number % IMAGES}.png"
            record = {"id": str(number - number % 1000 // 998), "image": image}
            stream.write("," * bool(number))
            stream.write("\n" + json.dumps({**record, "conversations": turns}))
        stream.write("\n]\n")


def main(words: list[str]) -> None:
    """Make the data, check them in a process of their own, and print the figures."""
    options = dict(word.split("=", 1) for word in words)
    count = int(options.get("records", 1_000_000))
    with tempfile.TemporaryDirectory(dir=options.get("folder")) as name:
        folder = Path(name)
        for number in range(IMAGES):
            Image.new("RGB", (32, 32), (number % 256, number // 4 % 256, 9)).save(
                folder / f"{number}.png"
            )
        write_records(folder / "data.json", count, int(options.get("words", 280)))
        size = (folder / "data.json").stat().st_size
        print(f"{count:,} records, {size / 1e9:.2f} GB", flush=True)
        start = time.monotonic()
        command = [sys.executable, "-m", "vlbench", "check", "recipe=yivl_llava", "only=chat"]
        command += [f"data.train={folder / 'data.json'}", f"out={folder / 'out'}"]
        done = subprocess.run([*command, "data.on_bad_sample=quarantine"])
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"exit code {done.returncode}, {seconds:.0f} s, peak {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main(sys.argv[1:])
