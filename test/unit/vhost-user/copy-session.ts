import { OwnedFd } from "../../../src/native/fd.ts";
import type { Session } from "../../../src/vhost-user/session.ts";

/** What a keeper does: the record as text, the fds as duplicates. */
export function copySession(session: Session) {
  const { data, fds } = session.snapshot();
  const duplicates = new Map(
    [...fds].map(([name, number]) => {
      const borrowed = new OwnedFd(number);
      const duplicate = borrowed.dup();
      borrowed.release();
      return [name, duplicate];
    }),
  );
  return { data: JSON.parse(JSON.stringify(data)), fds: duplicates };
}
