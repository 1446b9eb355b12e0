import { VhostdError } from "../base/errors.ts";

const UUID = /^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$/;

/**
 * The UUID of a VM in its canonical form. Nothing else is taken for one: VFs whose VM has the same name share memory,
 * and an empty shell variable must not put two VMs together.
 * @returns undefined where none was given
 * @throws VhostdError badArguments
 */
export function parseVmUuid(text: string | undefined): string | undefined {
  if (text === undefined || text === "") return undefined;
  const uuid = text.toLowerCase();
  if (UUID.test(uuid)) return uuid;
  throw new VhostdError("badArguments", `${JSON.stringify(text)} is not a UUID`, {
    fix: "give the UUID of the VM as libvirt shows it, 8-4-4-4-12 hexadecimal digits, or leave it out",
  });
}

/**
 * A vf-token in its canonical form.
 * @returns undefined where none was given
 * @throws VhostdError badArguments
 */
export function parseVfToken(text: string | undefined): string | undefined {
  const token = text?.toLowerCase();
  if (token === undefined || UUID.test(token)) return token;
  // Not the text itself: it is a secret, if a misspelt one.
  throw new VhostdError("badArguments", "the vf-token is not a UUID", {
    fix: "give 8-4-4-4-12 hexadecimal digits (uuidgen makes one), or leave it out",
  });
}
