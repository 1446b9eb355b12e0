/** Program: asks the back-end at a socket for its features, and says whether there was an answer. */
import { Request } from "../../../src/vhost-user/messages.ts";
import { VhostUserFrontend } from "../frontend/frontend.ts";

using frontend = VhostUserFrontend.connect(process.argv[2]!);
const answer = await frontend.askU64(Request.GET_FEATURES).catch(() => undefined);
console.log(answer === undefined ? "refused" : "served");
