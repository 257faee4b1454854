// The form that asks for the server's token. A token is kept for this tab only and never becomes part of a link.

import { forgetToken, storedToken, storeToken } from "./api.js";
import { $, setText } from "./dom.js";

export function showGate() {
  const wasRefused = storedToken() !== null;
  forgetToken();
  $("gate").hidden = false;
  $("token").value = "";
  $("token").focus();
  setText("alert", wasRefused ? "The server refused this token." : "");
  setText("note", "This server requires a token.");
}

export function hideGate() {
  $("gate").hidden = true;
}

/** Call `onToken` whenever a token has been entered. */
export function listenForToken(onToken) {
  $("gate").addEventListener("submit", (event) => {
    event.preventDefault();
    const token = $("token").value.trim();
    if (!/^[\x20-\x7e]+$/.test(token)) { // a header cannot carry it, so it is no token of any server
      setText("alert", "A token has characters of ASCII alone.");
      return;
    }
    storeToken(token);
    hideGate();
    onToken();
  });
}
