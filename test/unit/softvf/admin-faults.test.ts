import { expect, test } from "bun:test";
import { DelayPlan, FaultPlan } from "../../../src/softvf/admin-faults.ts";
import { PfSettings } from "../../../src/softvf/pf-options.ts";

test("faults are taken by command and VF, in the order they are written, as often as they say", () => {
  const plan = FaultPlan.parse("save@1:retry:2, save:fail:1,restore:silence");
  expect(plan.take("save", 1)).toBe("retry");
  expect(plan.take("save", 0)).toBe("fail");
  expect(plan.take("save", 0)).toBeUndefined();
  expect(plan.take("save", 1)).toBe("retry");
  expect(plan.take("save", 1)).toBeUndefined();
  expect(plan.take("getStatus", 1)).toBeUndefined();
  for (let count = 0; count < 100; count++) expect(plan.take("restore", 7)).toBe("silence");
  expect(FaultPlan.parse("").take("identity", undefined)).toBeUndefined();
  expect(FaultPlan.parse("identity:retry").take("identity", undefined)).toBe("retry");
});

test("commands of dirty pages have words, too", () => {
  const plan = FaultPlan.parse("start-tracking@1:fail:1,pending-map:silence,tracking-identity:retry:1");
  expect([plan.take("startTracking", 0), plan.take("startTracking", 1)]).toEqual([undefined, "fail"]);
  expect([plan.take("pendingMap", 3), plan.take("trackingIdentity", undefined)]).toEqual(["silence", "retry"]);
  expect(() => FaultPlan.parse("tracking-identity@0:fail")).toThrow("a command on a VF");
  const delays = DelayPlan.parse("stop-tracking=7,report-map=8");
  expect([delays.of("stopTracking"), delays.of("reportMap"), delays.of("pendingMap")]).toEqual([7, 8, 0]);
});

test("delays are for one command or for all others", () => {
  const plan = DelayPlan.parse("5,save=50,status=0");
  expect([plan.of("save"), plan.of("getStatus"), plan.of("restore")]).toEqual([50, 0, 5]);
  expect(DelayPlan.parse("modify=7").of("save")).toBe(0);
});

test("what cannot be meant is refused with what can", () => {
  for (const text of [
    "save",
    "save:",
    "save:never",
    "halt:fail",
    "save@x:fail",
    "save:fail:0",
    "save:fail:x",
    ",",
    "save@70000:fail",
  ]) {
    expect(() => FaultPlan.parse(text)).toThrow("option admin-fault has");
  }
  expect(() => FaultPlan.parse("identity@0:fail")).toThrow("a command on a VF");
  for (const text of ["x", "-1", "save=", "halt=5", "3600001", "5 5"]) {
    expect(() => DelayPlan.parse(text)).toThrow("option admin-delay has");
  }
});

test("live settings change one by one, and only to what fits", () => {
  const settings = new PfSettings({ adminDelay: "5", freeze: "hold" });
  expect([settings.migration, settings.freeze]).toEqual(["vendor", "hold"]);
  expect(() => settings.check("freeze", "never")).toThrow("must be one of drain, list, hold");
  expect(() => settings.set("adminFault", "x")).toThrow("option admin-fault has");
  settings.set("freeze", "list");
  expect([settings.freeze, settings.delays.of("save")]).toEqual(["list", 5]);
  settings.set("adminDelay", "");
  expect([settings.freeze, settings.delays.of("save")]).toEqual(["list", 0]);
});
