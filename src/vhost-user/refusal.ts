import { type ErrorDetails, VhostdError } from "../base/errors.ts";

/**
 * A message that is refused while the session goes on: the front-end is told where it asked for a reply. Every other
 * error in a handler ends the session, and so does a refusal that the front-end cannot be told of, unless it can do
 * without knowing.
 */
export class Refusal extends VhostdError {
  constructor(message: string, details: ErrorDetails = {}) {
    super("invalid", message, details);
    this.name = "Refusal";
  }
}

/** Guest memory that cannot be mapped. Setting up needs it: a front-end that is told so gives up, and does not say why. */
export class MemoryRefusal extends Refusal {
  constructor(message: string, details: ErrorDetails = {}) {
    super(message, details);
    this.name = "MemoryRefusal";
  }
}

/** Nothing else that the front-end sets up depends on the message: where it cannot be told, only the log is. */
export class MinorRefusal extends Refusal {
  constructor(message: string, details: ErrorDetails = {}) {
    super(message, details);
    this.name = "MinorRefusal";
  }
}
