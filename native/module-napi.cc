#include "module.h"

#include "symbols.h"
#include "threads-napi.h"

namespace vhostd {

void exportSymbol(Napi::Object exports, const char* name, void* address) {
  Napi::Env env = exports.Env();
  if (!exports.Has("symbols")) exports.Set("symbols", Napi::Object::New(env));
  Napi::Object symbols = exports.Get("symbols").As<Napi::Object>();
  // Addresses of user space fit 47 bits, a number's 53.
  symbols.Set(name, Napi::Number::New(env, static_cast<double>(reinterpret_cast<uintptr_t>(address))));
}

}  // namespace vhostd

static Napi::Object init(Napi::Env env, Napi::Object exports) {
#define VHOSTD_EXPORT(name, result, arguments) vhostd::exportSymbol(exports, #name, reinterpret_cast<void*>(&name));
  VHOSTD_SYMBOLS(VHOSTD_EXPORT)
#undef VHOSTD_EXPORT
  vhostd::initThreads(env, exports);
  if (InitRing != nullptr) InitRing(env, exports);
  return exports;
}

NODE_API_MODULE(vhostd, init)
