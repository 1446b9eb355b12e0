import Type, { type TSchema } from "typebox";
import { defineMethod, type Method } from "./method.ts";
import { describeSchema } from "./mismatch.ts";

/** Of the interface as a whole, for `rpc.discover` and the documentation. */
export interface InterfaceInfo {
  readonly title: string;
  readonly version: string;
}

interface ObjectSchema {
  readonly properties?: Readonly<Record<string, TSchema>>;
  readonly required?: readonly string[];
}

/** The table of methods as an OpenRPC 1.3 document. */
function openRpcDocument(info: InterfaceInfo, methods: readonly Method[]): Record<string, unknown> {
  return {
    openrpc: "1.3.2",
    info,
    methods: methods.map(({ name, summary, params, result }) => ({
      name,
      summary,
      paramStructure: "by-name",
      params: members(params).map(([member, schema, required]) => ({ name: member, required, schema })),
      result: { name: "result", schema: result },
    })),
  };
}

/** `methods` and, at their end, `rpc.discover`, which describes them all. */
export function withDiscovery(info: InterfaceInfo, methods: readonly Method[]): Method[] {
  const all: Method[] = [...methods];
  all.push(
    defineMethod({
      name: "rpc.discover",
      summary: "Describes this interface as an OpenRPC document.",
      params: Type.Object({}, { additionalProperties: false }),
      result: Type.Record(Type.String(), Type.Unknown()),
      handler: () => openRpcDocument(info, all),
    }),
  );
  return all;
}

/** The table of methods for people: one section a method. Markdown. */
export function describeMethods(methods: readonly Method[]): string {
  return methods.map(describeMethod).join("\n");
}

function describeMethod({ name, summary, params, result }: Method): string {
  return `## ${name}\n\n${summary}\n\n${table("Parameter", params)}${table("Result", result)}`;
}

function table(title: string, schema: TSchema): string {
  const rows = members(schema).map(
    ([name, member, required]) => `| \`${name}\` | ${required ? "yes" : "no"} | ${cell(describeSchema(member))} |`,
  );
  if (rows.length > 0) return `| ${title} | Always | What |\n|---|---|---|\n${rows.join("\n")}\n\n`;
  return title === "Parameter" ? "No parameters.\n\n" : `${title}: ${describeSchema(schema)}.\n\n`;
}

/** A bar would end the cell. */
function cell(text: string): string {
  return text.replaceAll("|", "\\|");
}

function members(schema: TSchema): [name: string, schema: TSchema, required: boolean][] {
  const { properties = {}, required = [] } = schema as ObjectSchema;
  return Object.entries(properties).map(([name, member]) => [name, member, required.includes(name)]);
}
