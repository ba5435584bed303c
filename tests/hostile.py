"""Files that strangers could send to do harm: small on the disk, large or endless when they are read."""
from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit, RLELossless, generate_uid


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deflated(head: bytes, zeros: int, tail: bytes = b"") -> bytes:
    """`head`, so many zeros and `tail` in deflate's form: one compressed block again and again, which takes no time."""
    def packed(data: bytes, mode: int) -> bytes:
        packer = zlib.compressobj(9, wbits=-15)
        return packer.compress(data) + packer.flush(mode)

    block = 2**20
    return (packed(head, zlib.Z_FULL_FLUSH) + packed(bytes(block), zlib.Z_FULL_FLUSH) * (zeros // block)
            + packed(bytes(zeros % block) + tail, zlib.Z_FINISH))


def png(width: int, height: int, depth: int = 8, color: int = 0, rows: int | None = None) -> bytes:
    """A PNG of zeros that states its size; `rows` of them are there."""
    line = 1 + (width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color] + 7) // 8
    count = line * (height if rows is None else rows)
    data = b"\x78\xda" + deflated(b"", count) + struct.pack(">I", count % 65521 << 16 | 1)
    palette = chunk(b"PLTE", bytes(3)) if color == 3 else b""
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)) + palette
            + chunk(b"IDAT", data) + chunk(b"IEND", b""))


def tiff(entries: dict[int, tuple[int, list[int]]], data: bytes = b"", big: bool = False) -> bytes:
    """A TIFF of one directory: tag -> (type, values). Pixels `data` begin at byte 8 (16 if `big`)."""
    start = 16 if big else 8
    size, field, letters = (20, 8, {3: "H", 4: "I", 16: "Q"}) if big else (12, 4, {3: "H", 4: "I"})
    place = start + len(data)
    table, extra = b"", b""
    after = place + (8 if big else 2) + size * len(entries) + field
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}{letters[kind]}", *values)
        if len(packed) > field:
            packed, extra = struct.pack("<Q" if big else "<I", after + len(extra)), extra + packed
        table += struct.pack("<HHQ" if big else "<HHI", tag, kind, len(values)) + packed.ljust(field, b"\0")
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, place) if big else struct.pack("<2sHI", b"II", 42, place)
    return head + data + struct.pack("<Q" if big else "<H", len(entries)) + table + bytes(field) + extra


def dicom(pixels: bytes | list[bytes] = b"", syntax=ExplicitVRLittleEndian, **entries) -> Dataset:
    """A DICOM data set, gray, 8 bits, unless `entries` say otherwise."""
    data = Dataset()
    data.file_meta = meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = syntax, "1.2.840.10008.5.1.4.1.1.7", generate_uid()
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    basis = {"PhotometricInterpretation": "MONOCHROME2", "SamplesPerPixel": 1, "PixelRepresentation": 0, "BitsAllocated": 8, "Rows": 8, "Columns": 8}
    for key, value in (basis | entries).items():
        setattr(data, key, value)
    if "BitsStored" not in entries:
        data.BitsStored = data.BitsAllocated
    data.HighBit = data.BitsStored - 1
    data.PixelData = encapsulate(pixels) if isinstance(pixels, list) else pixels
    data["PixelData"].VR = "OW" if data.BitsAllocated > 8 else "OB"
    return data


def save(data: Dataset) -> Callable[[Path], None]:
    return lambda path: data.save_as(path, enforce_file_format=True)


def rle(zeros: int) -> bytes:
    """A frame of DICOM's run-length code of one segment: `zeros` bytes' worth of runs."""
    return struct.pack("<16I", 1, 64, *[0] * 14) + b"\x81\0" * (zeros // 128 + 1)


def sparse(head: bytes, size: int) -> Callable[[Path], None]:
    """A file that begins so and has a hole up to `size`."""
    def write(path: Path) -> None:
        path.write_bytes(head)
        os.truncate(path, size)
    return write


def jpeg(width: int, height: int, scans: int = 1, stated: tuple[int, int] | None = None, mode: str = "L") -> bytes:
    """A flat JPEG whose last scan is repeated, and that may lie about its size."""
    stream = io.BytesIO()
    Image.new(mode, (width, height)).save(stream, "JPEG", progressive=scans > 1)
    data = stream.getvalue()
    last = data.rindex(b"\xff\xda")
    data = data[:last] + data[last:-2] * scans + data[-2:]
    if stated:
        at = data.index(b"\xff\xc2" if scans > 1 else b"\xff\xc0")
        data = data[:at + 5] + struct.pack(">HH", stated[1], stated[0]) + data[at + 9:]
    return data


def gif(frames: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6) + b",\0\0\0\0\1\0\1\0\0\2\2D\1\0" * frames + b";"


TILES = {256: (4, [600]), 257: (4, [600]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1]), 322: (3, [1]), 323: (3, [1])}
GRAY = {258: (3, [8]), 262: (3, [1]), 277: (3, [1])}


def _deflated(zeros: int) -> bytes:
    """A DICOM file whose data set is deflated and holds so many zeros as pixels."""
    stream = io.BytesIO()
    dicom(b"", Rows=17320, Columns=17320).save_as(stream, enforce_file_format=True)
    data = stream.getvalue().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99").replace(b"UI\x14\0" + b"1.2.840.10008.1.2.1.99", b"UI\x16\0" + b"1.2.840.10008.1.2.1.99")
    begin = data.index(b"\x08\0\x16\0UI")
    return data[:begin] + deflated(data[begin:-4] + struct.pack("<I", zeros), zeros)


def _elements(count: int) -> bytes:
    """A DICOM header of very many elements."""
    stream = io.BytesIO()
    dicom(bytes(64)).save_as(stream, enforce_file_format=True)
    data = stream.getvalue()
    at = data.index(b"\x28\0\x02\0US")  # before the first element of group 0028
    return data[:at] + b"\x09\0\x10\0LO\0\0" * count + data[at:]


def _described(count: int) -> Callable[[Path], None]:
    """A DICOM header whose group 0028 is long; most of it is a hole in the file."""
    def write(path: Path) -> None:
        data = _elements(0)
        at = data.index(b"\x28\0\x02\0US")
        with path.open("wb") as stream:
            stream.write(data[:at])
            for i in range(count):
                stream.write(struct.pack("<HH4sI", 0x28, 0x7000 + i, b"OB\0\0", 2**18))
                stream.seek(2**18, os.SEEK_CUR)
            stream.write(data[at:])
    return write


def _lying(change: Callable[[bytes], bytes], fragments: int = 1, mode: str = "L") -> Callable[[Path], None]:
    """A DICOM of 8 x 8 pixels whose compressed frame, changed somehow, states 13000 x 13000."""
    data = dicom(b"", JPEGBaseline8Bit)
    data.PixelData = encapsulate([change(jpeg(8, 8, stated=(13000, 13000), mode=mode))], fragments_per_frame=fragments)
    return save(data)


def codestream(width: int, height: int, layers: int = 1, precinct: int = 0x77, tile: int = 0) -> bytes:
    """A JPEG 2000 of one channel without any data."""
    def part(marker: int, body: bytes) -> bytes:
        return struct.pack(">HH", marker, len(body) + 2) + body

    size = struct.pack(">H8IH", 0, width, height, 0, 0, tile or width, tile or height, 0, 0, 1) + b"\7\1\1"
    coding = struct.pack(">BBHBBBBBBB", 1, 0, layers, 0, 0, 0, 0, 0, 1, precinct)
    return (b"\xff\x4f" + part(0xFF51, size) + part(0xFF52, coding) + part(0xFF5C, b"\x40\x40")
            + part(0xFF90, struct.pack(">HIBB", 0, 14, 0, 1)) + b"\xff\x93\xff\xd9")


def _boxed(stream: bytes) -> bytes:
    """A codestream in the boxes of a JPEG 2000 file."""
    return b"\0\0\0\x0cjP  \r\n\x87\n" + struct.pack(">I4s", 0, b"jp2c") + stream


def several_scans(width: int, height: int, times: int) -> bytes:
    """A JPEG that is not progressive, with one scan for each color, again and again."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG", subsampling=0)
    head = bytearray(stream.getvalue()[:stream.getvalue().index(b"\xff\xda")])
    at = head.index(b"\xff\xc0")
    head[at + 5:at + 9] = struct.pack(">HH", height, width)
    scans = b"".join(b"\xff\xda" + struct.pack(">HBBBBBB", 8, 1, color, table, 0, 63, 0) + b"\0\0" for color, table in ((1, 0), (2, 0x11), (3, 0x11)))
    return bytes(head) + scans * times + b"\xff\xd9"


def comments_of_holes(path: Path) -> None:
    """A JPEG of 8 x 8 pixels with half a gigabyte of comments."""
    data = jpeg(8, 8)
    with path.open("wb") as stream:
        stream.write(data[:2])
        for _ in range(8000):
            stream.write(b"\xff\xfe\xff\xff")
            stream.seek(65533, os.SEEK_CUR)
        stream.write(data[2:])


def chunk_of_a_hole(path: Path) -> None:
    """A PNG of 16 x 16 pixels with a chunk of 900 MB that takes no place on the disk."""
    data = png(16, 16)
    with path.open("wb") as stream:
        stream.write(data[:33] + struct.pack(">I", 900_000_000) + b"vpAg")
        stream.seek(900_000_004, os.SEEK_CUR)
        stream.write(data[33:])


def pixels_of_a_hole(path: Path) -> None:
    """A PNG whose pixels end early, in a chunk of 900 MB."""
    data = png(4000, 4000, rows=4000)
    at = data.index(b"IDAT")
    with path.open("wb") as stream:
        stream.write(data[:at - 4] + struct.pack(">I", 900_000_000) + data[at:-16])
        stream.seek(900_000_000 + at + 4)
        stream.write(bytes(4) + chunk(b"IEND", b""))


def _deflated_beside(zeros: int, spare: int = 0) -> bytes:
    """A deflated DICOM of 8 x 8 pixels with so many zeros in an element before them, and spare bytes behind."""
    stream = io.BytesIO()
    dicom(bytes(64), DeflatedExplicitVRLittleEndian).save_as(stream, enforce_file_format=True)
    begin = 144 + struct.unpack_from("<I", stream.getvalue(), 140)[0]
    plain = zlib.decompress(stream.getvalue()[begin:], -15)
    return stream.getvalue()[:begin] + deflated(b"\x09\0\x01\x10OB\0\0" + struct.pack("<I", zeros), zeros, plain[plain.index(b"\x28\0\x02\0US"):]) + bytes(spare)


def _nested(depth: int) -> bytes:
    """A DICOM header of sequences in sequences."""
    data = _elements(0)
    at = data.index(b"\x28\0\x02\0US")
    return data[:at] + b"\x09\0\x10\0SQ\0\0\xff\xff\xff\xff\xfe\xff\0\xe0\xff\xff\xff\xff" * depth + data[at:]


def write(data: bytes | Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data() if callable(data) else data)


FILES: dict[str, Callable[[Path], object]] = {
    # programs and endless things
    "eps.png": write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(/tmp/ran) (w) file closefile showpage\n"),
    "pdf.png": write(b"%PDF-1.4\n"),
    "fifo.png": lambda path: os.mkfifo(path),
    "zero.png": lambda path: path.symlink_to("/dev/zero"),
    "random.png": lambda path: path.symlink_to("/dev/urandom"),
    "folder.png": lambda path: path.mkdir(),
    "nowhere.png": lambda path: path.symlink_to("nowhere"),
    "circle.png": lambda path: path.symlink_to("circle.png"),
    "empty.png": write(b""),
    # large files
    "sparse.png": sparse(png(8, 8)[:60], 2**31),
    "sparse.dcm": sparse(b"\0" * 128 + b"DICM", 2**31),
    "sparse_below_the_limit.png": sparse(png(8, 8)[:60], 600_000_000),
    "sparse_below_the_limit.tif": sparse(tiff(TILES), 600_000_000),
    "sparse_below_the_limit.webp": sparse(b"RIFF\xf0\xff\xff\x3fWEBPVP8 \xe0\xff\xff\x3f", 600_000_000),
    "sparse_below_the_limit.jpg": sparse(b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0", 600_000_000),
    "sparse_below_the_limit.avif": sparse(b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B", 600_000_000),
    "sparse_below_the_limit.jp2": sparse(b"\0\0\0\x0cjP  \r\n\x87\n", 600_000_000),
    "sparse_below_the_limit.ppm": sparse(b"P2 30000 30000 255\n", 600_000_000),
    "sparse_below_the_limit.gif": sparse(gif(1)[:-1], 600_000_000),
    "sparse_below_the_limit": sparse(b"\0" * 128 + b"DICM\x02\0\x01\0OB\0\0\xff\xff\xff\x3f", 600_000_000),
    # pictures that swell
    "zeros.png": write(lambda: png(30000, 30000, 1)),
    "zeros_rgb.png": write(lambda: png(15000, 15000, 8, 2)),
    "zeros_rgba_16.png": write(lambda: png(8000, 8000, 16, 6)),
    "zeros_rgb_16.png": write(lambda: png(9000, 9000, 16, 2)),
    "zeros_16.png": write(lambda: png(16000, 16000, 16)),
    "stated.png": write(png(2**31 - 1, 2**31 - 1, rows=0)),
    "long.png": write(png(2**31 - 1, 1, rows=0)),
    "zeros.jpg": write(lambda: jpeg(8, 8, stated=(65500, 65500))),
    "scans.jpg": write(lambda: jpeg(4000, 4000, 3000)),
    "stated.gif": write(b"GIF89a\xff\xff\xff\xff\x80\0\0" + bytes(6) + b",\0\0\0\0\xff\xff\xff\xff\0\2\2D\1\0;"),
    "stated.bmp": write(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)),
    "stated.webp": write(b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\x3f\0\xff\x3f\0VP8 \0\0\0\0"),
    "stated.jp2": write(b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8IH", 2**30, 2**30, 0, 0, 2**30, 2**30, 0, 0, 1) + b"\7\1\1\xff\x90\0\x0a\0\0\0\0\0\0\0\1\xff\x93"),
    "tiny_tiles.jp2": write(b"\xff\x4f\xff\x51\0\x29\0\0" + struct.pack(">8IH", 16000, 16000, 0, 0, 1, 1, 0, 0, 1) + b"\7\1\1\xff\x90\0\x0a\0\0\0\0\0\0\0\1\xff\x93"),
    "tiles.jp2": write(codestream(4000, 4000, tile=16)),
    "precincts.jp2": write(codestream(6900, 6900, precinct=0x11)),
    "boxed_precincts.jp2": write(_boxed(codestream(2000, 2000, precinct=0))),
    "layers.jp2": write(codestream(600, 600, layers=65535, precinct=0x11)),
    "several_scans.jpg": write(lambda: several_scans(8200, 8200, 1)),
    "repeated_scans.jpg": write(lambda: several_scans(4000, 4000, 1000)),
    "comments.jpg": comments_of_holes,
    "exif.jpg": write(lambda: (data := jpeg(8, 8))[:2] + b"".join(b"\xff\xe1\xff\xffExif\0\0" + bytes(65527) for _ in range(900)) + data[2:]),
    "chunk.png": chunk_of_a_hole,
    "pixels.png": pixels_of_a_hole,
    "stated_part.png": write(lambda: (data := png(9, 9, 16, 6))[:33] + struct.pack(">I", 1_862_270_996) + data[37:]),
    "plain.ppm": write(lambda: b"P3 9000 1000 255\n" + b"0 " * 27_000_000),
    "maximum.ppm": write(lambda: b"P5 6000 6000 99\n" + bytes(36_000_000)),
    "runs.qoi": write(lambda: b"qoif" + struct.pack(">IIBB", 12000, 12000, 3, 0) + b"\xfd" * (12000 * 12000 // 62)),
    "runs.bmp": write(lambda: b"BM" + struct.pack("<IHHIIiiHHIIiiII", 0, 0, 0, 58, 40, 9000, 9000, 1, 8, 1, 0, 0, 0, 1, 0) + bytes(4) + b"\xff\0" * 330_000),
    "runs.tga": write(lambda: b"\0\0\x0b" + bytes(9) + struct.pack("<HHBB", 60000, 60000, 8, 0) + b"\xff\0" * 100),
    "runs.pcx": write(lambda: b"\n\5\1\x08" + struct.pack("<HHHH", 0, 0, 60000, 60000) + bytes(53) + b"\3" + struct.pack("<H", 60001) + bytes(60) + b"\xff\0" * 1000),
    # TIFFs
    "tiles.tif": write(lambda: tiff(TILES | {256: (4, [600]), 257: (4, [600]), 324: (4, [8] * 360_000), 325: (4, [1] * 360_000)}, b"\0")),
    "strips.tif": write(lambda: tiff(GRAY | {256: (4, [1]), 257: (4, [2_000_000]), 259: (3, [1]), 273: (4, [8] * 2_000_000), 278: (3, [1]), 279: (4, [1] * 2_000_000)}, b"\0")),
    "large_tile.tif": write(lambda: tiff(TILES | {256: (4, [16]), 257: (4, [16]), 259: (3, [8]), 322: (4, [40000]), 323: (4, [40000]), 324: (4, [8]), 325: (4, [9])}, zlib.compress(b"\0"))),
    "deflated.tif": write(lambda: tiff(GRAY | {256: (4, [20000]), 257: (4, [20000]), 259: (3, [8]), 273: (4, [8]), 278: (4, [20000]), 279: (4, [10**6])}, bytes(9))),
    "stated.tif": write(tiff(GRAY | {256: (4, [2**31]), 257: (4, [2**31]), 259: (3, [1]), 273: (4, [8]), 278: (4, [2**31]), 279: (4, [9])}, bytes(9))),
    "stated_big.tif": write(tiff(GRAY | {256: (4, [2**31]), 257: (4, [2**31]), 259: (3, [1]), 273: (16, [16]), 278: (4, [2**31]), 279: (16, [2**62])}, bytes(9), big=True)),
    "overlapping.tif": write(lambda: tiff(GRAY | {256: (4, [8]), 257: (4, [8]), 259: (3, [1]), 273: (4, [8]), 279: (4, [64])}
                                          | {tag: (4, [0] * 20_000) for tag in range(40_000, 40_100)}, bytes(64))),
    "describes_itself.tif": write(lambda: struct.pack("<2sHIH", b"II", 42, 8, 60_000) + b"".join(struct.pack("<HHII", tag, 7, 700_000, 8) for tag in range(1000, 61_000))),
    "settings_describe_themselves.tif": write(lambda: tiff(GRAY | {256: (4, [8]), 257: (4, [8]), 259: (3, [1]), 273: (4, [8]), 279: (4, [64]), 34665: (4, [300])}, bytes(64)).ljust(300, b"\0")
                                              + struct.pack("<H", 60_000) + b"".join(struct.pack("<HHII", tag, 7, 700_000, 8) for tag in range(1000, 61_000))),
    "circle_of_pages.tif": write(lambda: (page := tiff(GRAY | {256: (4, [2**20]), 257: (4, [2**20]), 259: (3, [1]), 273: (4, [8]), 279: (4, [64])}, bytes(64)))[:-4] + page[4:8]),
    # DICOM
    "rle.dcm": save(dicom([rle(0)], RLELossless, Rows=65535, Columns=65535)),
    "rle_below_the_limit.dcm": save(dicom([rle(0)], RLELossless, Rows=16000, Columns=16000)),
    "rle_rgb.dcm": save(dicom([rle(0)], RLELossless, Rows=9000, Columns=9000, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)),
    "deflated.dcm": write(lambda: _deflated(300_000_000)),
    "frames.dcm": save(dicom([rle(0)], RLELossless, Rows=64, Columns=64, NumberOfFrames=2**31 - 1)),
    "samples.dcm": save(dicom(bytes(64), Rows=8000, Columns=8000, SamplesPerPixel=60000)),
    "stated.dcm": save(dicom(bytes(64), Rows=65535, Columns=65535, BitsAllocated=32)),
    "lying_jpeg.dcm": save(dicom([jpeg(8, 8, stated=(65500, 2600))], JPEGBaseline8Bit)),
    "deflated_beside.dcm": write(lambda: _deflated_beside(490_000_000)),
    "deflated_beside_and_padded.dcm": write(lambda: _deflated_beside(490_000_000, 4_450_000)),
    "described.dcm": _described(400),
    "boxed.dcm": save(dicom([_boxed(codestream(5000, 5000))], JPEG2000Lossless)),
    "comments.dcm": _lying(lambda data: data[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 2 + data[2:]),
    "fill.dcm": _lying(lambda data: data[:2] + b"\xff" + data[2:]),
    "fragments.dcm": _lying(lambda data: data, fragments=4),
    "channels.dcm": save(dicom([jpeg(6000, 6000, mode="RGB")], JPEGBaseline8Bit, Rows=6000, Columns=6000)),
    "precincts.dcm": save(dicom([codestream(6900, 6900, precinct=0x11)], JPEG2000Lossless, Rows=6900, Columns=6900)),
    "scans.dcm": save(dicom([jpeg(4000, 4000, 3000)], JPEGBaseline8Bit, Rows=4000, Columns=4000)),
    "runs.dcm": save(dicom([struct.pack("<16I", 1, 64, *[0] * 14) + bytes(24_000_000)], RLELossless, Rows=4000, Columns=3000)),
    "runs_that_swell.dcm": save(dicom([rle(2**30)], RLELossless, Rows=4000, Columns=4000)),
    "elements.dcm": write(lambda: _elements(3_000_000)),
    "nested.dcm": write(lambda: _nested(100_000)),
    # damaged ones
    "cut.png": write(lambda: png(300, 300)[:100]),
    "cut.jpg": write(lambda: jpeg(300, 300)[:400]),
    "text.png": write(b"id,dice\n"),
    "<img src=x onerror=alert(1)>.png": write(b"\x89PNG\r\n\x1a\n"),
    "line\nbreak.png": write(b"\x89PNG\r\n\x1a\n"),
}


def make(folder: Path) -> list[Path]:
    """Write all of them into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, build in FILES.items():
        build(folder / name)
    return [folder / name for name in FILES]
