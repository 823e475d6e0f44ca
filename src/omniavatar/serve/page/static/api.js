// Requests to the server. An error has words for a person, and the field it is about.
import { t } from "./strings.js";

export class Problem extends Error {
  constructor(message, code = "", param = null, offline = false) {
    super(message);
    Object.assign(this, { code, param, offline });
  }
}

async function answered(path, options) {
  let answer;
  try {
    answer = await fetch(path, { credentials: "same-origin", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(t("offline"), "offline", null, true);
  }
  if (answer.ok) return answer;
  const body = await answer.json().catch(() => ({}));
  const { message = answer.statusText, code = "", param = null } = body.error ?? {};
  if (answer.status === 401) throw new Problem(t("no_key"), code);
  throw new Problem(answer.status >= 500 ? t("server_problem", { message }) : message, code, param);
}

export async function getJson(path, options) {
  return (await answered(path, options)).json();
}

export function postJson(path, values, options) {
  const headers = { "Content-Type": "application/json" };
  return getJson(path, { method: "POST", headers, body: JSON.stringify(values), ...options });
}

export async function getFile(path, name, type, options) {
  const blob = await (await answered(path, options)).blob();
  return new File([blob], name, { type: type || blob.type });
}

// A request as the form of the API: fields that are null are left out.
export function videoForm(request) {
  const form = new FormData();
  for (const [name, value] of Object.entries(request)) {
    if (value === null || value === undefined) continue;
    form.append(name, name === "extra_params" ? JSON.stringify(value) : value);
  }
  return form;
}

export function postForm(path, form, options) {
  return getJson(path, { method: "POST", body: form, ...options });
}

// Cancels a video, and returns it; one that has just finished stays.
export function cancel(id) {
  return getJson(`/v1/videos/${id}/cancel`, { method: "POST" });
}

export function remove(id) {
  return getJson(`/v1/videos/${id}`, { method: "DELETE" });
}
