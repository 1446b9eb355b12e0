#pragma once

#include <napi.h>

/**
 * The native module has two faces: C functions, whose addresses it exports for bun:ffi, and Node-API objects for what
 * has threads. Sources that include napi.h are called *-napi.cc and are thin; everything else is plain C++, so that the
 * test driver (test/) can run it under sanitizers without a JavaScript engine.
 */
namespace vhostd {

/** Adds `exports.symbols[name] = address`: a C function that TypeScript links by bun:ffi. */
void exportSymbol(Napi::Object exports, const char* name, void* address);

}  // namespace vhostd

/** The ring engine's registration hook, defined in ring/; the module works without it. */
__attribute__((weak)) void InitRing(Napi::Env env, Napi::Object exports);
