"""Records a comparison of the gallery: runs it and packs its store.

    python tools/gallery.py NAME [NAME ...] [--processes 2]

``docs/gallery/NAME.toml`` says what is compared. Runs go to ``runs/gallery/NAME``, where an interrupted command goes
on; the finished store, packed, to ``docs/gallery/NAME.sqlite.gz``, from which the documentation is built. It lacks
the curves of tuning runs, which no page shows; everything else is there.
"""

import argparse
import gzip
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

ROOT = Path(__file__).parents[1]
GALLERY = ROOT / "docs" / "gallery"


def record(name: str, processes: int) -> Path:
    folder = Path("runs") / "gallery" / name
    configuration = GALLERY / f"{name}.toml"
    words = [str(configuration.relative_to(ROOT)), f"out={folder}", f"processes={processes}"]
    subprocess.run([sys.executable, "-m", "telos.lab.command", "compare", *words], cwd=ROOT, check=True)
    return pack(ROOT / folder / "store.sqlite", GALLERY / f"{name}.sqlite.gz")


def pack(store: Path, packed: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        slim = Path(folder) / "store.sqlite"
        shutil.copyfile(store, slim)
        with closing(sqlite3.connect(slim)) as connection:
            connection.execute("UPDATE runs SET curve = '[]' WHERE role = 'tuning'")
            connection.commit()
            connection.execute("VACUUM")
        # no name and no time: the same store gives the same file
        with packed.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as out:
            out.write(slim.read_bytes())
    return packed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="+", choices=sorted(path.stem for path in GALLERY.glob("*.toml")))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    for name in options.names:
        packed = record(name, options.processes)
        print(f"{packed.relative_to(ROOT)}: {packed.stat().st_size / 2**10:,.0f} KiB")


if __name__ == "__main__":
    main()
