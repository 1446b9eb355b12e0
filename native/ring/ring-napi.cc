#include <algorithm>
#include <atomic>

#include "../module.h"
#include "../thread.h"
#include "ring-function.h"

namespace vhostd::ring {
namespace {

uint64_t unsignedInteger(Napi::Value value) { return static_cast<uint64_t>(value.As<Napi::Number>().Int64Value()); }
int integer(Napi::Value value) { return value.As<Napi::Number>().Int32Value(); }
uint16_t queueIndex(Napi::Value value) { return static_cast<uint16_t>(integer(value)); }

Parameters parametersOf(Napi::Object object) {
  Parameters parameters;
  const Napi::Array names = object.GetPropertyNames();
  for (uint32_t index = 0; index < names.Length(); index++) {
    const std::string name = names.Get(index).As<Napi::String>().Utf8Value();
    const Napi::Value value = object.Get(name);
    if (value.IsBoolean()) {
      parameters[name] = value.As<Napi::Boolean>().Value();
    } else if (value.IsNumber()) {
      parameters[name] = value.As<Napi::Number>().Int64Value();
    } else if (value.IsBigInt()) {
      bool lossless = false;
      parameters[name] = value.As<Napi::BigInt>().Int64Value(&lossless);
    } else {
      parameters[name] = value.ToString().Utf8Value();
    }
  }
  return parameters;
}

uint64_t word(Napi::Value value) {
  bool lossless = false;
  return value.As<Napi::BigInt>().Uint64Value(&lossless);
}

QueueConfig queueConfigOf(Napi::Object object) {
  QueueConfig config;
  config.size = queueIndex(object.Get("size"));
  config.desc = word(object.Get("desc"));
  config.driver = word(object.Get("driver"));
  config.device = word(object.Get("device"));
  config.lastAvail = queueIndex(object.Get("lastAvail"));
  config.lastUsed = queueIndex(object.Get("lastUsed"));
  const Napi::Array inFlight = object.Get("inFlight").As<Napi::Array>();
  for (uint32_t index = 0; index < inFlight.Length(); index++) config.inFlight.push_back(queueIndex(inFlight.Get(index)));
  return config;
}

/**
 * RingFunction for JavaScript. Arguments are checked in src/native/ring-engine.ts. Texts say what is wrong, empty ones
 * that nothing is; numbers are -errno.
 */
class RingFunctionObject final : public Napi::ObjectWrap<RingFunctionObject> {
 public:
  static void define(Napi::Env env, Napi::Object exports) {
    exports.Set("RingFunction", DefineClass(env, "RingFunction",
                                            {
                                                InstanceMethod<&RingFunctionObject::create>("create"),
                                                InstanceMethod<&RingFunctionObject::doorbell>("doorbell"),
                                                InstanceMethod<&RingFunctionObject::events>("events"),
                                                InstanceMethod<&RingFunctionObject::tryEnter>("tryEnter"),
                                                InstanceMethod<&RingFunctionObject::leave>("leave"),
                                                InstanceMethod<&RingFunctionObject::withdraw>("withdraw"),
                                                InstanceMethod<&RingFunctionObject::map>("map"),
                                                InstanceMethod<&RingFunctionObject::unmap>("unmap"),
                                                InstanceMethod<&RingFunctionObject::unmapAll>("unmapAll"),
                                                InstanceMethod<&RingFunctionObject::unmapping>("unmapping"),
                                                InstanceMethod<&RingFunctionObject::activate>("activate"),
                                                InstanceMethod<&RingFunctionObject::start>("start"),
                                                InstanceMethod<&RingFunctionObject::setCall>("setCall"),
                                                InstanceMethod<&RingFunctionObject::takeCall>("takeCall"),
                                                InstanceMethod<&RingFunctionObject::setKick>("setKick"),
                                                InstanceMethod<&RingFunctionObject::quiesce>("quiesce"),
                                                InstanceMethod<&RingFunctionObject::passCalls>("passCalls"),
                                                InstanceMethod<&RingFunctionObject::unquiesce>("unquiesce"),
                                                InstanceMethod<&RingFunctionObject::inFlight>("inFlight"),
                                                InstanceMethod<&RingFunctionObject::rings>("rings"),
                                                InstanceMethod<&RingFunctionObject::takeRequests>("takeRequests"),
                                                InstanceMethod<&RingFunctionObject::answer>("answer"),
                                                InstanceMethod<&RingFunctionObject::configure>("configure"),
                                                InstanceMethod<&RingFunctionObject::startLog>("startLog"),
                                                InstanceMethod<&RingFunctionObject::stopLog>("stopLog"),
                                                InstanceMethod<&RingFunctionObject::cutLog>("cutLog"),
                                                InstanceMethod<&RingFunctionObject::logLoss>("logLoss"),
                                                InstanceMethod<&RingFunctionObject::takeLog>("takeLog"),
                                                InstanceMethod<&RingFunctionObject::requestStop>("requestStop"),
                                                InstanceMethod<&RingFunctionObject::tryStop>("tryStop"),
                                                InstanceMethod<&RingFunctionObject::tryPark>("tryPark"),
                                                InstanceMethod<&RingFunctionObject::indices>("indices"),
                                                InstanceMethod<&RingFunctionObject::failure>("failure"),
                                                InstanceMethod<&RingFunctionObject::stats>("stats"),
                                                InstanceMethod<&RingFunctionObject::carrier>("carrier"),
                                                InstanceMethod<&RingFunctionObject::info>("info"),
                                                InstanceMethod<&RingFunctionObject::close>("close"),
                                                StaticMethod<&RingFunctionObject::ending>("ending"),
                                            }));
  }

  explicit RingFunctionObject(const Napi::CallbackInfo& info) : ObjectWrap(info) {}

 private:
  Napi::Value text(const std::string& value) { return Napi::String::New(Env(), value); }
  Napi::Value number(double value) { return Napi::Number::New(Env(), value); }

  Napi::Object indicesObject(uint16_t queue, uint16_t lastAvail, uint16_t lastUsed) {
    Napi::Object object = Napi::Object::New(Env());
    object.Set("queue", number(queue));
    object.Set("lastAvail", number(lastAvail));
    object.Set("lastUsed", number(lastUsed));
    return object;
  }

  Napi::Value create(const Napi::CallbackInfo& info) {
    std::string reason;
    function_ = RingFunction::create(info[0].As<Napi::String>().Utf8Value(), parametersOf(info[1].As<Napi::Object>()),
                                     queueIndex(info[2]), reason);
    return text(reason);
  }
  Napi::Value doorbell(const Napi::CallbackInfo& info) { return number(function_->doorbell(queueIndex(info[0]))); }
  Napi::Value events(const Napi::CallbackInfo&) { return number(function_->events()); }
  Napi::Value tryEnter(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(Env(), function_->tryEnter(integer(info[0])));
  }
  void leave(const Napi::CallbackInfo&) { function_->leave(); }
  void withdraw(const Napi::CallbackInfo&) { function_->withdraw(); }
  Napi::Value map(const Napi::CallbackInfo& info) {
    return number(function_->map(unsignedInteger(info[0]), unsignedInteger(info[1]), integer(info[2]),
                                 unsignedInteger(info[3]), info[4].As<Napi::Boolean>().Value()));
  }
  Napi::Value unmap(const Napi::CallbackInfo& info) {
    return number(function_->unmap(unsignedInteger(info[0]), unsignedInteger(info[1])));
  }
  void unmapAll(const Napi::CallbackInfo&) { function_->unmapAll(); }
  Napi::Value unmapping(const Napi::CallbackInfo&) { return Napi::Boolean::New(Env(), function_->unmapping()); }
  Napi::Value activate(const Napi::CallbackInfo& info) {
    return text(function_->activate(queueIndex(info[0]), queueConfigOf(info[1].As<Napi::Object>()), word(info[2])));
  }
  Napi::Value start(const Napi::CallbackInfo& info) { return text(function_->start(word(info[0]))); }
  Napi::Value setCall(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(Env(), function_->setCall(queueIndex(info[0]), integer(info[1])));
  }
  void takeCall(const Napi::CallbackInfo& info) {
    function_->takeCall(queueIndex(info[0]), File(integer(info[1])));
  }
  Napi::Value setKick(const Napi::CallbackInfo& info) {
    return number(function_->setKick(queueIndex(info[0]), integer(info[1])));
  }
  void quiesce(const Napi::CallbackInfo&) { function_->quiesce(); }
  Napi::Value passCalls(const Napi::CallbackInfo&) { return Napi::Boolean::New(Env(), function_->passCalls()); }
  void unquiesce(const Napi::CallbackInfo&) { function_->unquiesce(); }
  Napi::Value inFlight(const Napi::CallbackInfo&) { return number(function_->inFlight()); }
  Napi::Value rings(const Napi::CallbackInfo&) {
    Napi::Array list = Napi::Array::New(Env());
    for (const QueueState& state : function_->rings()) {
      Napi::Object object = indicesObject(state.queue, state.lastAvail, state.lastUsed);
      Napi::Array heads = Napi::Array::New(Env());
      for (const uint16_t head : state.inFlight) heads.Set(heads.Length(), number(head));
      object.Set("inFlight", heads);
      list.Set(list.Length(), object);
    }
    return list;
  }
  Napi::Value takeRequests(const Napi::CallbackInfo&) {
    Napi::Array list = Napi::Array::New(Env());
    for (const ForwardedRequest& request : function_->takeRequests()) {
      Napi::Object object = Napi::Object::New(Env());
      Napi::Uint8Array readable = Napi::Uint8Array::New(Env(), request.readable.size());
      std::copy(request.readable.begin(), request.readable.end(), readable.Data());
      object.Set("id", number(static_cast<double>(request.id)));
      object.Set("queue", number(request.queue));
      object.Set("readable", readable);
      object.Set("writable", number(static_cast<double>(request.writable)));
      list.Set(list.Length(), object);
    }
    return list;
  }
  void answer(const Napi::CallbackInfo& info) {
    const Napi::Uint8Array bytes = info[1].As<Napi::Uint8Array>();
    function_->answer(unsignedInteger(info[0]), {bytes.Data(), bytes.Data() + bytes.ByteLength()});
  }
  Napi::Value configure(const Napi::CallbackInfo& info) {
    return text(function_->configure(parametersOf(info[0].As<Napi::Object>())));
  }
  Napi::Value startLog(const Napi::CallbackInfo& info) {
    const LogMap map = info[0].As<Napi::String>().Utf8Value() == "bitmap" ? LogMap::bitmap : LogMap::bytemap;
    const LogRange range = {unsignedInteger(info[1]), unsignedInteger(info[2]), unsignedInteger(info[3])};
    if (info.Length() < 6) return text(function_->startLog(map, range, nullptr, nullptr));
    std::vector<LogPlace> places;
    const Napi::Array list = info[4].As<Napi::Array>();
    for (uint32_t index = 0; index < list.Length(); index++) {
      const Napi::Object place = list.Get(index).As<Napi::Object>();
      places.push_back({unsignedInteger(place.Get("address")), unsignedInteger(place.Get("length"))});
    }
    return text(function_->startLog(map, range, &places, Unwrap(info[5].As<Napi::Object>())->function_.get()));
  }
  void stopLog(const Napi::CallbackInfo&) { function_->stopLog(); }
  void cutLog(const Napi::CallbackInfo& info) { function_->cutLog(info[0].As<Napi::String>().Utf8Value()); }
  Napi::Value logLoss(const Napi::CallbackInfo&) {
    return text(function_->log() == nullptr ? "" : function_->log()->lost());
  }
  Napi::Value takeLog(const Napi::CallbackInfo& info) {
    const uint64_t length = unsignedInteger(info[1]);
    Napi::Uint8Array bytes = Napi::Uint8Array::New(Env(), length);
    function_->log()->take(unsignedInteger(info[0]), length, bytes.Data());
    return bytes;
  }
  void requestStop(const Napi::CallbackInfo& info) {
    const std::string how = info[0].As<Napi::String>().Utf8Value();
    function_->requestStop(how == "park" ? Stop::park : how == "finish" ? Stop::finish : Stop::drop);
  }
  Napi::Value tryStop(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(Env(), function_->tryStop(integer(info[0])));
  }
  Napi::Value tryPark(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(Env(), function_->tryPark(integer(info[0])));
  }
  Napi::Value indices(const Napi::CallbackInfo&) {
    Napi::Array list = Napi::Array::New(Env());
    for (const QueueIndices& entry : function_->indices()) {
      list.Set(list.Length(), indicesObject(entry.queue, entry.lastAvail, entry.lastUsed));
    }
    return list;
  }
  Napi::Value failure(const Napi::CallbackInfo&) { return text(function_->failure()); }
  Napi::Value stats(const Napi::CallbackInfo&) {
    Napi::Array list = Napi::Array::New(Env());
    for (uint16_t queue = 0; queue < function_->queues(); queue++) {
      const QueueStats stats = function_->stats(queue);
      Napi::Object object = Napi::Object::New(Env());
      object.Set("received", number(static_cast<double>(stats.received)));
      object.Set("completed", number(static_cast<double>(stats.completed)));
      object.Set("bad", number(static_cast<double>(stats.bad)));
      object.Set("bytes", number(static_cast<double>(stats.bytes)));
      list.Set(queue, object);
    }
    return list;
  }
  Napi::Value carrier(const Napi::CallbackInfo&) { return Napi::Boolean::New(Env(), function_->carrier()); }
  Napi::Value info(const Napi::CallbackInfo&) {
    Napi::Object object = Napi::Object::New(Env());
    for (const auto& [name, value] : function_->info()) object.Set(name, number(static_cast<double>(value)));
    return object;
  }
  void close(const Napi::CallbackInfo&) {
    function_->withdraw();
    function_->requestStop(Stop::drop);
    if (function_->tryStop(1)) {
      function_.reset();
      return;
    }
    // The worker hangs in the disk. Whatever becomes of it, nobody waits: without a thread the rest is left behind.
    const auto destroy = [](void* function) -> void* {
      delete static_cast<RingFunction*>(function);
      ending_--;
      return nullptr;
    };
    ending_++;
    if (startThread(nullptr, destroy, function_.release()) != 0) ending_--;
  }
  static Napi::Value ending(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), ending_); }

  /** Functions that were closed and have not ended. */
  static inline std::atomic<int> ending_{0};

  std::unique_ptr<RingFunction> function_;
};

}  // namespace
}  // namespace vhostd::ring

void InitRing(Napi::Env env, Napi::Object exports) {
  vhostd::ring::RingFunctionObject::define(env, exports);
}
