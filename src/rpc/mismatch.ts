import type { TSchema } from "typebox";
import Value from "typebox/value";
import { shown } from "./protocol.ts";

/** The parts of JSON Schema that the schemas of this project use. */
interface SchemaNode {
  readonly type?: string;
  readonly const?: unknown;
  readonly enum?: readonly unknown[];
  readonly anyOf?: readonly SchemaNode[];
  readonly properties?: Readonly<Record<string, SchemaNode>>;
  readonly items?: SchemaNode;
  readonly minimum?: number;
  readonly maximum?: number;
  readonly minLength?: number;
  readonly maxLength?: number;
  readonly pattern?: string;
  readonly description?: string;
}

/** Why a value does not fit its schema, as a sentence and as data. */
export interface Mismatch {
  /** Where: `device`, `vf[0].mode`; empty for the whole value. */
  readonly path: string;
  readonly expected: string;
  readonly message: string;
}

/**
 * The first thing about `value` that does not fit.
 * @param word what a member is called: "parameter", "key"
 */
export function findMismatch(schema: TSchema, value: unknown, word: string): Mismatch | undefined {
  const errors = Value.Errors(schema, value);
  const first = errors.find((e) => e.keyword === "additionalProperties" || e.keyword === "required") ?? errors[0];
  if (first === undefined) return undefined;

  const steps = first.instancePath.split("/").slice(1).map(unescapePointer);
  if (first.keyword === "required") {
    const member = first.params.requiredProperties[0]!;
    const path = joinPath([...steps, member]);
    const expected = describeSchema(walk(schema, [...steps, member]));
    return { path, expected, message: `${word} "${path}" is missing, expected ${expected}` };
  }
  if (first.keyword === "additionalProperties") {
    const path = joinPath([...steps, first.params.additionalProperties[0]!]);
    const known = Object.keys(walk(schema, steps)?.properties ?? {});
    const expected = known.length === 0 ? "none" : known.join(", ");
    return { path, expected, message: `${word} "${shorten(path)}" is not known, known are: ${expected}` };
  }
  const path = joinPath(steps);
  const expected = describeSchema(walk(schema, steps));
  const subject = path === "" ? `the ${word}s are` : `${word} "${path}" is`;
  return { path, expected, message: `${subject} ${shown(valueAt(value, steps))}, expected ${expected}` };
}

/** A schema in words: `"client" or "server"`, `an integer from 0 to 5`, `a string (PCI address)`. */
export function describeSchema(schema: object | undefined): string {
  const node: SchemaNode = schema ?? {};
  const description = node.description === undefined ? "" : ` (${node.description})`;
  return `${describeType(node)}${description}`;
}

function describeType(node: SchemaNode): string {
  if (node.const !== undefined) return JSON.stringify(node.const);
  if (node.enum !== undefined) return node.enum.map((value) => JSON.stringify(value)).join(" or ");
  if (node.anyOf !== undefined) return node.anyOf.map(describeSchema).join(" or ");
  switch (node.type) {
    case "string":
      return `a${node.minLength === undefined ? "" : " non-empty"} string${limit(" of at most ", node.maxLength, " characters")}`;
    case "integer":
    case "number":
      return `${node.type === "integer" ? "an integer" : "a number"}${limit(" from ", node.minimum)}${limit(" to ", node.maximum)}`;
    case "boolean":
      return "true or false";
    case "array":
      return `a list, each item ${describeSchema(node.items)}`;
    case "object":
      return `an object${node.properties === undefined ? "" : ` of ${Object.keys(node.properties).join(", ") || "nothing"}`}`;
    case "null":
      return "null";
    default:
      return "any value";
  }
}

function limit(before: string, value: number | undefined, after = ""): string {
  return value === undefined ? "" : `${before}${value}${after}`;
}

function walk(schema: TSchema, steps: readonly string[]): SchemaNode | undefined {
  let node: SchemaNode | undefined = schema as SchemaNode;
  for (const step of steps) node = node?.items ?? node?.properties?.[step];
  return node;
}

function valueAt(value: unknown, steps: readonly string[]): unknown {
  let inner = value;
  for (const step of steps) inner = (inner as Record<string, unknown> | null)?.[step];
  return inner;
}

function joinPath(steps: readonly string[]): string {
  return steps.reduce((path, step) => {
    if (/^\d+$/.test(step)) return `${path}[${step}]`;
    return path === "" ? step : `${path}.${step}`;
  }, "");
}

/** RFC 6901, 4. */
function unescapePointer(step: string): string {
  return step.replaceAll("~1", "/").replaceAll("~0", "~");
}

function shorten(text: string): string {
  return text.length <= 64 ? text : `${text.slice(0, 61)}...`;
}
