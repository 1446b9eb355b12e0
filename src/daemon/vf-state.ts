/** Where a VF is in its life. */
export type VfState =
  | {
      readonly name:
        | "attaching"
        | "adopting"
        | "idle"
        | "configuring"
        | "running"
        | "stopping"
        | "detaching"
        | "absent";
    }
  | { readonly name: "failed"; readonly reason: string };

type Name = VfState["name"];

/**
 * What may follow what. `failed` is left by removing the VF only; `attaching` again while it is opened again; `configuring` from
 * `running` where an earlier process has died in a start, whose message is handled again.
 */
const NEXT: Readonly<Record<Name, readonly Name[]>> = {
  attaching: ["idle", "detaching", "failed", "absent"],
  adopting: ["idle", "running", "failed", "absent"],
  idle: ["configuring", "attaching", "detaching", "failed"],
  configuring: ["running", "stopping", "failed"],
  running: ["configuring", "stopping", "failed"],
  stopping: ["idle", "failed"],
  failed: ["detaching", "absent"],
  detaching: ["absent"],
  absent: [],
};

/** @throws Error for a step that the table does not have: a defect of this program */
export function checkTransition(from: VfState, to: VfState): void {
  if (!NEXT[from.name].includes(to.name)) throw new Error(`a VF cannot go from ${from.name} to ${to.name}`);
}
