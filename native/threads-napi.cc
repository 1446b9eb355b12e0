#include "threads-napi.h"

#include <string.h>
#include <sys/epoll.h>

#include <memory>
#include <utility>
#include <vector>

#include "poller.h"
#include "relay.h"
#include "slow.h"
#include "symbols.h"

namespace vhostd {
namespace {

int integer(Napi::Value value) { return value.As<Napi::Number>().Int32Value(); }
uint64_t unsignedInteger(Napi::Value value) { return static_cast<uint64_t>(value.As<Napi::Number>().Int64Value()); }

/** The promise of a slow call; only the engine's thread touches it. */
struct Promised {
  Napi::Promise::Deferred deferred;
  /** Where what the call took is written back to; empty where it gives nothing back. */
  Napi::Reference<Napi::Uint8Array> argument;
};

/** A slow call that knows its promise. */
template <typename Call>
struct Job : Call {
  template <typename... Rest>
  explicit Job(Promised promised, Rest&&... rest) : Call(std::forward<Rest>(rest)...), promised(std::move(promised)) {}
  Promised promised;
};

/** A thread-safe function that keeps the event loop alive only while there is something to wait for. */
class Callback {
 public:
  void open(Napi::Function function, const char* name) {
    if (opened) return;
    handle = Napi::ThreadSafeFunction::New(function.Env(), function, name, 0, 1);
    handle.Unref(function.Env());
    opened = true;
  }
  ~Callback() {
    if (opened) handle.Release();
  }
  void hold(Napi::Env env, bool keepsLoopAlive) {
    if (!opened || keepsLoopAlive == held) return;
    held = keepsLoopAlive;
    if (held) handle.Ref(env);
    else handle.Unref(env);
  }
  Napi::ThreadSafeFunction handle;

 private:
  bool opened = false;
  bool held = false;
};

/** What one environment has: an environment is a program, or an isolated test file. */
class Threads {
 public:
  Threads() : poller(onReady, this), slow(onFinished, this) {}
  ~Threads() {
    relay.stop();
    poller.stop();
    slow.wait();
  }

  int startPoller(Napi::Function report) {
    ready.open(report, "vhostd-poller");
    return poller.start();
  }

  /** Calls under way keep the loop alive. */
  int startSlow(Napi::Env env, SlowCall* call) {
    finished.open(Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "vhostd-slow");
    int result = slow.start(call);
    if (result == 0) {
      outstanding++;
      finished.hold(env, true);
    }
    return result;
  }

  void ended(Napi::Env env) {
    if (--outstanding == 0) finished.hold(env, false);
  }

  // Declared before the threads that use them: destroyed after those have ended.
  Callback ready;
  Callback finished;
  Poller poller;
  Relay relay;
  SlowCalls slow;

 private:
  static void onReady(void* self) {
    Threads* threads = static_cast<Threads*>(self);
    threads->ready.handle.NonBlockingCall(threads, [](Napi::Env env, Napi::Function report, Threads* threads) {
      std::vector<uint64_t> taken = threads->poller.take();
      Napi::Array tokens = Napi::Array::New(env, taken.size());
      for (size_t index = 0; index < taken.size(); index++) {
        tokens.Set(static_cast<uint32_t>(index), static_cast<double>(taken[index]));
      }
      report.Call({tokens});
    });
  }

  static void onFinished(void* self, SlowCall* call);

  unsigned outstanding = 0;
};

Threads& threadsOf(Napi::Env env) { return *env.GetInstanceData<Threads>(); }

/** @param bytes what the call gives back; null where that is nothing */
void settle(Napi::Env env, Promised& promised, const void* bytes, size_t length, int64_t result) {
  if (bytes != nullptr) {
    Napi::Uint8Array into = promised.argument.Value();
    // The program may have detached or shrunk its buffer meanwhile.
    if (into.ByteLength() == length) memcpy(into.Data(), bytes, length);
  }
  promised.deferred.Resolve(Napi::Number::New(env, static_cast<double>(result)));
}

void Threads::onFinished(void* self, SlowCall* call) {
  Threads* threads = static_cast<Threads*>(self);
  threads->finished.handle.NonBlockingCall(call, [](Napi::Env env, Napi::Function, SlowCall* ended) {
    std::unique_ptr<SlowCall> call(ended);
    threadsOf(env).ended(env);
    if (auto* ioctl = dynamic_cast<Job<SlowIoctl>*>(ended)) {
      const std::vector<uint8_t>& argument = ioctl->argument;
      settle(env, ioctl->promised, ioctl->byValue ? nullptr : argument.data(), argument.size(), call->result);
    }
    if (auto* access = dynamic_cast<Job<SlowAccess>*>(ended)) {
      const std::vector<FileAccess>& accesses = access->accesses;
      settle(env, access->promised, accesses.data(), accesses.size() * sizeof(FileAccess), call->result);
    }
    if (auto* close = dynamic_cast<Job<SlowClose>*>(ended)) settle(env, close->promised, nullptr, 0, call->result);
  });
}

Napi::Value slowClose(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  int fd = integer(info[0]);
  auto deferred = Napi::Promise::Deferred::New(env);
  auto job = std::make_unique<Job<SlowClose>>(Promised{deferred, {}}, fd);
  if (threadsOf(env).startSlow(env, job.get()) == 0) job.release();
  // No thread to be had: a pause is the lesser evil than an fd that is never closed.
  else deferred.Resolve(Napi::Number::New(env, vhostd_close(fd)));
  return deferred.Promise();
}

Napi::Value slowIoctl(const Napi::CallbackInfo& info) {
  using IoctlJob = Job<SlowIoctl>;
  Napi::Env env = info.Env();
  auto deferred = Napi::Promise::Deferred::New(env);
  int fd = integer(info[0]);
  auto request = static_cast<unsigned long>(unsignedInteger(info[1]));
  std::unique_ptr<IoctlJob> job;
  if (info[2].IsNumber()) {
    auto value = static_cast<unsigned long>(unsignedInteger(info[2]));
    job = std::make_unique<IoctlJob>(Promised{deferred, {}}, fd, request, value);
  } else {
    auto bytes = info[2].As<Napi::Uint8Array>();
    Promised promised{deferred, Napi::Reference<Napi::Uint8Array>::New(bytes, 1)};
    std::vector<uint8_t> argument(bytes.Data(), bytes.Data() + bytes.ByteLength());
    job = std::make_unique<IoctlJob>(std::move(promised), fd, request, std::move(argument));
  }
  int result = threadsOf(env).startSlow(env, job.get());
  if (result == 0) job.release();
  else deferred.Resolve(Napi::Number::New(env, result));
  return deferred.Promise();
}

/** (fd, table of FileAccess, which is written back) */
Napi::Value slowAccess(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  auto deferred = Napi::Promise::Deferred::New(env);
  auto table = info[1].As<Napi::Uint8Array>();
  std::vector<FileAccess> accesses(table.ByteLength() / sizeof(FileAccess));
  memcpy(accesses.data(), table.Data(), accesses.size() * sizeof(FileAccess));
  Promised promised{deferred, Napi::Reference<Napi::Uint8Array>::New(table, 1)};
  auto job = std::make_unique<Job<SlowAccess>>(std::move(promised), integer(info[0]), std::move(accesses));
  int result = threadsOf(env).startSlow(env, job.get());
  if (result == 0) job.release();
  else deferred.Resolve(Napi::Number::New(env, result));
  return deferred.Promise();
}

template <typename Body>
void method(Napi::Object exports, const char* name, Body body) {
  exports.Set(name, Napi::Function::New(
                        exports.Env(),
                        [body](const Napi::CallbackInfo& info) -> Napi::Value {
                          return Napi::Number::New(info.Env(), static_cast<double>(body(threadsOf(info.Env()), info)));
                        },
                        name));
}

}  // namespace

void initThreads(Napi::Env env, Napi::Object exports) {
  using Info = const Napi::CallbackInfo&;
  // Its finalizer stops the threads, as a net only: process.exit and uncaught errors never run it.
  env.SetInstanceData(new Threads());
  method(exports, "pollerStart",
         [](Threads& threads, Info info) { return threads.startPoller(info[0].As<Napi::Function>()); });
  method(exports, "pollerStop", [](Threads& threads, Info info) {
    threads.ready.hold(info.Env(), false);
    threads.poller.stop();
    return 0;
  });
  method(exports, "pollerAdd", [](Threads& threads, Info info) {
    return threads.poller.add(integer(info[0]), info[1].ToBoolean() ? EPOLLOUT : EPOLLIN);
  });
  method(exports, "pollerRearm",
         [](Threads& threads, Info info) { return threads.poller.rearm(unsignedInteger(info[0])); });
  method(exports, "pollerRemove", [](Threads& threads, Info info) {
    threads.poller.remove(unsignedInteger(info[0]));
    return 0;
  });
  method(exports, "pollerHold", [](Threads& threads, Info info) {
    threads.ready.hold(info.Env(), info[0].ToBoolean());
    return 0;
  });
  method(exports, "relayStart", [](Threads& threads, Info) { return threads.relay.start(); });
  method(exports, "relayStop", [](Threads& threads, Info) {
    threads.relay.stop();
    return 0;
  });
  method(exports, "relayToEventfd", [](Threads& threads, Info info) {
    return threads.relay.connect(integer(info[0]), integer(info[1]));
  });
  method(exports, "relayToAddress", [](Threads& threads, Info info) {
    return threads.relay.connect(integer(info[0]), unsignedInteger(info[1]), integer(info[2]),
                                 static_cast<uint32_t>(unsignedInteger(info[3])));
  });
  method(exports, "relayDisconnect", [](Threads& threads, Info info) {
    threads.relay.disconnect(unsignedInteger(info[0]));
    return 0;
  });
  method(exports, "slowWait", [](Threads& threads, Info) {
    threads.slow.wait();
    return 0;
  });
  exports.Set("slowClose", Napi::Function::New(env, slowClose, "slowClose"));
  exports.Set("slowAccess", Napi::Function::New(env, slowAccess, "slowAccess"));
  exports.Set("slowIoctl", Napi::Function::New(env, slowIoctl, "slowIoctl"));
}

}  // namespace vhostd
