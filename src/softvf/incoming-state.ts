import { BLOB_ALIGNMENT, BLOB_FIELDS_MAX, BLOB_SIZE_MAX } from "../virtio/admin/state-blob.ts";
import { AdminError } from "./admin-error.ts";

const COUNT_SIZE = 4;
const FIELD_HEAD = 8;

/**
 * A blob that comes in pieces, one behind the other. Nothing says how long it will be but its fields and that it is
 * padded to whole pages.
 */
export class IncomingState {
  private buffer = new Uint8Array(BLOB_ALIGNMENT);
  private received = 0;
  /** Where the next field begins, and how many there are still; undefined until the first bytes are there. */
  private fields: { at: number; left: number } | undefined;

  /**
   * @returns the blob, once all fields are there and pages are full
   * @throws AdminError where the piece does not follow the last, or it cannot become a blob
   */
  add(offset: number, piece: Uint8Array): Uint8Array | undefined {
    if (offset !== this.received) {
      throw new AdminError("dataTransfer", `the piece is at ${offset}; ${this.received} bytes have come`);
    }
    const end = offset + piece.length;
    if (end > BLOB_SIZE_MAX)
      throw new AdminError("dataTransfer", `the state has ${end} bytes; at most ${BLOB_SIZE_MAX}`);
    this.makeRoom(end);
    this.buffer.set(piece, offset);
    this.received = end;
    const whole = this.walk() && end % BLOB_ALIGNMENT === 0;
    return whole ? this.buffer.subarray(0, end) : undefined;
  }

  /** As far as there are bytes. @returns whether all fields are there */
  private walk(): boolean {
    const view = new DataView(this.buffer.buffer);
    if (this.fields === undefined) {
      if (this.received < COUNT_SIZE) return false;
      const left = view.getUint32(0, true);
      if (left > BLOB_FIELDS_MAX)
        throw new AdminError("dataTransfer", `the state has ${left} fields; at most ${BLOB_FIELDS_MAX}`);
      this.fields = { at: COUNT_SIZE, left };
    }
    const { fields } = this;
    while (fields.left > 0) {
      if (fields.at + FIELD_HEAD > this.received) return false;
      const end = fields.at + FIELD_HEAD + view.getUint32(fields.at + 4, true);
      if (end > BLOB_SIZE_MAX) throw new AdminError("dataTransfer", `a field ends at ${end}; at most ${BLOB_SIZE_MAX}`);
      if (end > this.received) return false;
      fields.at = end;
      fields.left--;
    }
    return true;
  }

  private makeRoom(size: number): void {
    if (size <= this.buffer.length) return;
    const wider = new Uint8Array(Math.min(BLOB_SIZE_MAX, Math.max(size, 2 * this.buffer.length)));
    wider.set(this.buffer.subarray(0, this.received));
    this.buffer = wider;
  }
}
