"""One latent coded alone, by the writer and reader that streams are made with."""

from mantis_core.bitstream.coder import Ints, RangeReader, RangeWriter, Table


def encode(symbols: Ints, table: Table) -> bytes:
    """The payload of a latent (C, h, w)."""
    writer = RangeWriter()
    writer.put_symbols(symbols, table)
    return writer.close()


def decode(payload: bytes, table: Table, shape: tuple[int, int, int]) -> Ints:
    """The latent of `payload`; BitstreamError unless it is just what `encode` makes of it."""
    reader = RangeReader(payload)
    symbols = reader.take_symbols(table, shape)
    reader.close()
    return symbols
