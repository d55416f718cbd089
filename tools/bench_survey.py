"""Many files audited at once: 49 mixed ones are made, and the table, its time and memory are printed.

python tools/bench_survey.py [FOLDER]

In FOLDER (default: one that is removed afterwards) are the published headers of tests/manifests as files of holes,
embeddings, pickles, what is not supported, and broken files. The audit runs on a terminal of 80 columns. Its processor
time is that of the whole process, less what an interpreter that only starts takes.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COUNT = 49


def make(folder: Path) -> None:
    """Exactly COUNT files of every kind."""
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
    import torch
    from safetensors.torch import save_file

    from oracles import published_manifests, sparse

    folder.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": torch.zeros(8, 768)}, folder / "style.safetensors")
    save_file({"clip_l": torch.zeros(4, 768), "clip_g": torch.zeros(4, 1280)}, folder / "style-xl.safetensors")
    save_file({"<s0>": torch.zeros(768), "<s1>": torch.zeros(768)}, folder / "two-words.safetensors")
    torch.save({"string_to_param": {"*": torch.zeros(2, 1024)}, "name": "old"}, folder / "old.pt")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, folder / "flux.safetensors")
    save_file({"joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(2, 2)}, folder / "sd3.safetensors")
    save_file({"wte.weight": torch.zeros(3, 5, 7)}, folder / "something.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nothing")
    (folder / "page.ckpt").write_bytes(b"<!DOCTYPE html><html>")
    for file in (ROOT / "tests" / "weights" / "files").iterdir():
        if file.suffix != ".md":
            shutil.copy(file, folder)
    for stem, manifest in sorted(published_manifests().items()):
        if len(list(folder.iterdir())) == COUNT:
            return
        sparse(manifest, folder / f"{stem}.safetensors")


def run(command: list[str], environment: dict[str, str]) -> tuple[str, float, float, int]:
    """What a command prints on a terminal, its processor and wall time in seconds, its peak memory in bytes."""
    reader, writer = pty.openpty()
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=writer, stderr=subprocess.DEVNULL, env=environment)
    os.close(writer)
    text = bytearray()
    try:
        while piece := os.read(reader, 1 << 16):
            text += piece
    except OSError:  # the terminal's other end was closed
        pass
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - begin
    return text.decode().replace("\r", ""), used.ru_utime + used.ru_stime, wall, used.ru_maxrss * 1024


def main() -> None:
    """See above."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary) / "files"
        maker = get_context("spawn").Process(target=make, args=(folder,))  # with torch, whose memory is not to count
        maker.start()
        maker.join()
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb", "PYTHONPATH": str(ROOT)}
        _, idle, _, _ = run([sys.executable, "-c", "pass"], environment)
        table, processor, wall, memory = run([sys.executable, "-m", "nativesd", "audit", str(folder)], environment)
    print(table)
    print(
        f"{COUNT} files: {processor - idle:.2f} s of processor time beyond the interpreter's {idle:.2f} s, "
        f"{wall:.2f} s, {memory / 1e6:.0f} MB"
    )


if __name__ == "__main__":
    main()
