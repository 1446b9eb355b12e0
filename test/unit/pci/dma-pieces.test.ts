import { expect, test } from "bun:test";
import { PIECE_SIZE, piecesOf } from "../../../src/pci/vfio/pieces.ts";

const GiB = 2 ** 30;
const file = { dev: 1, ino: 2 };

function cut(iova: number, size: number, offset = 0): number[][] {
  return piecesOf({ iova, size, offset, file }).map((piece) => [piece.iova, piece.size, piece.offset]);
}

test("a range is cut at multiples of the piece size of its IOVA, and each piece keeps its place in the file", () => {
  expect(cut(0, 4096, 8192)).toEqual([[0, 4096, 8192]]);
  expect(cut(GiB - 4096, 8192)).toEqual([
    [GiB - 4096, 4096, 0],
    [GiB, 4096, 4096],
  ]);
  expect(cut(4 * GiB, 2 * GiB, 3 * GiB)).toEqual([
    [4 * GiB, GiB, 3 * GiB],
    [5 * GiB, GiB, 4 * GiB],
  ]);
  expect(cut(4 * GiB + 4096, 2 * GiB, 12288)).toEqual([
    [4 * GiB + 4096, GiB - 4096, 12288],
    [5 * GiB, GiB, GiB + 8192],
    [6 * GiB, 4096, 2 * GiB + 8192],
  ]);
});

test("the size is that of earlier versions, whose mappings have to be found", () => {
  expect(PIECE_SIZE).toBe(1_073_741_824);
});
