import { functionFeatures, offeredFeatures } from "../../../src/vhost-user/features.ts";
import { describeFeatures, FeatureBit, featureBits } from "../../../src/virtio/features.ts";
import { MockTarget } from "../mock-target.ts";
import { demand, holds } from "./holds.ts";
import * as inputs from "./inputs.ts";
import type { Check, LoadedSubject } from "./subject.ts";

/** Bits 0 to 23 and 50 to 63 belong to the device class (VIRTIO 1.2, 2.2). */
export const CLASS_BITS = 0x00ff_ffffn | (0x3fffn << 50n);

/** Of the other bits a guest sees these, where the device has them. */
const SHARED_BITS = featureBits(
  FeatureBit.ringIndirectDesc,
  FeatureBit.ringEventIdx,
  FeatureBit.version1,
  FeatureBit.inOrder,
);

/** Which features pass, held against what the author of the class says and not against the class itself. */
export const FEATURE_CHECKS: readonly Check[] = [
  { name: "a guest is offered what the device offers, and no more", of: "class", run: leaksNothing },
  { name: "the device is not told of what was added", of: "class", run: tellsNothing },
  { name: "features that are added and hidden have names", of: "class", run: namesFeatures },
];

/** What a guest may see of a device of this class. @param device all 64 bits that it offers */
function expectedFeatures({ added = [], hidden = [] }: LoadedSubject, device: bigint): bigint {
  const ofClass = ((device & CLASS_BITS) | featureBits(...added)) & ~featureBits(...hidden);
  return ofClass | (device & SHARED_BITS) | featureBits(FeatureBit.vhostUserProtocolFeatures);
}

/**
 * @param logged the front-end can have the pages marked that the device writes
 * @throws Error naming the bits where a guest is offered other features
 */
export function checkOffered(subject: LoadedSubject, device: bigint, offered: bigint, logged = false): void {
  const logging = logged ? featureBits(FeatureBit.vhostLogAll) : 0n;
  const expected = expectedFeatures(subject, device) | logging;
  const named = (bits: bigint) => describeFeatures(bits, subject.deviceClass.features.names).join(", ");
  const leaking = offered & ~expected;
  demand(
    leaking === 0n,
    `the guest is offered ${named(leaking)}, which the device does not offer or no guest may see ("added" and "hidden" of the subject say otherwise)`,
  );
  const missing = expected & ~offered;
  demand(missing === 0n, `the guest is not offered ${named(missing)} ("hidden" of the subject says otherwise)`);
}

async function leaksNothing(subject: LoadedSubject): Promise<void> {
  await holds(inputs.features, (deviceFeatures) => {
    const target = new MockTarget({ deviceClass: subject.deviceClass, deviceFeatures });
    checkOffered(subject, deviceFeatures, offeredFeatures(target));
  });
}

async function tellsNothing({ deviceClass, added = [] }: LoadedSubject): Promise<void> {
  await holds(inputs.features, (deviceFeatures) => {
    const target = new MockTarget({ deviceClass, deviceFeatures });
    const told = functionFeatures(offeredFeatures(target), target);
    const wrong = told & (featureBits(...added) | ~deviceFeatures);
    const names = describeFeatures(wrong, deviceClass.features.names).join(", ");
    demand(wrong === 0n, `${names} would be acknowledged to the device, which is the daemon's own matter`);
  });
}

async function namesFeatures({ deviceClass: { features } }: LoadedSubject): Promise<void> {
  const { names, add = [], hide = [] } = features;
  for (const bit of [...add, ...hide]) demand(Object.hasOwn(names, bit), `features.names has no name for bit ${bit}`);
  const both = add.find((bit) => hide.includes(bit));
  demand(both === undefined, `bit ${both} is added and hidden`);
  const all = Object.values(names);
  const twice = all.find((name, index) => all.indexOf(name) !== index);
  demand(twice === undefined, `two feature bits have the name ${twice}`);
}
