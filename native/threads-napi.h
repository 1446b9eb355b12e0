#pragma once

#include "module.h"

namespace vhostd {

/**
 * Adds the poller, the relay and slow calls to `exports`:
 *   pollerStart(report: (tokens: number[]) => void): number   pollerStop()
 *   pollerAdd(fd, out: boolean): number   pollerRearm(token): number   pollerRemove(token)
 *   pollerHold(keepsLoopAlive: boolean)
 *   relayStart(): number   relayStop()   relayDisconnect(number)
 *   relayToEventfd(kick, eventfd): number   relayToAddress(kick, address, width, value): number
 *   slowClose(fd): Promise<number>   slowIoctl(fd, request, argument: Uint8Array): Promise<number>   slowWait()
 * Numbers are >= 0 or -errno. Arguments are checked in TypeScript.
 */
void initThreads(Napi::Env env, Napi::Object exports);

}  // namespace vhostd
