// Every English text of the page. `{name}` is replaced by a value.
export const STRINGS = {
  name: "OmniAvatar",
  skip: "Skip to the form",
  tabs: "What to do",
  tab_make: "Make a video",
  tab_talk: "Talk",

  portrait: "Portrait",
  portrait_hint: "One face, looking at the camera. JPEG, PNG, WebP, HEIC or AVIF.",
  choose_portrait: "Choose a portrait file",
  drop_portrait: "Drop a picture here",
  choose_file: "Choose file",
  camera: "Camera",
  take: "Take picture",
  close_camera: "Close camera",
  example: "Example",
  example_portrait: "Example portrait",
  example_voice: "Example voice",
  portrait_alt: "The chosen portrait",
  portrait_named: "{name}, {width} × {height}",
  portrait_unseen: "{name} (this browser cannot show the picture; the server reads it)",
  camera_name: "camera.png",
  no_camera: "The camera cannot be used ({reason}). Allow it in the browser, or choose a file.",
  portrait_missing: "Choose a portrait first: a file, the camera or the example.",
  packaged_note: "This small model knows rendered heads only. A photograph will come out blurred and unlike the person. For photographs, fetch a large model (it needs a GPU), then start the page with it (in a copy of the repository):",
  warned: "Note: {text}.",
  warned_portrait: "The portrait: {text}.",
  warned_voice: "The voice: {text}.",
  check_running: "Comparing portrait and voice with what the model was trained for …",
  check_failed: "Portrait and voice were not compared with what the model was trained for: {message}",
  packaged_commands: "omniavatar download 1.3B\nomniavatar web -c configs/inference_1.3B.yaml",

  voice: "Voice",
  voice_from: "Where the voice comes from",
  voice_file: "File",
  voice_record: "Microphone",
  voice_text: "Text",
  drop_voice: "Drop a sound here",
  choose_voice: "Choose a sound file",
  record: "Record",
  record_stop: "Stop recording",
  recorded_name: "recording.webm",
  level: "Loudness of the microphone",
  no_microphone: "The microphone cannot be used ({reason}). Allow it in the browser, or choose a file.",
  speech_label: "What the person says",
  speech_example: "Hello! I am a face that your computer made.",
  speak: "Make the voice",
  speaking: "Making the voice …",
  speech_name: "speech.wav",
  speech_by: "Voice “{name}”: English, made on this machine, clear but plain. A recording sounds better.",
  speech_none: "No voice is installed. Run: {remedy}",
  speech_empty: "Write what the person says first.",
  voice_player: "The chosen voice",
  voice_named: "{name}, {seconds}",
  voice_none: "No voice: the video is silent, {seconds} long.",
  remove: "Remove",
  remove_voice: "Remove the voice",

  prompt: "Description",
  prompt_hint_packaged: "Only these words act on this model; other words have no effect.",
  prompt_hint: "A sentence about the person, the movement and the background.",
  prompt_missing: "Write a description, or pick words.",
  words_expression: "Expression",
  words_motion: "Movement",
  words_background: "Background",

  quality: "Quality and shape",
  model: "Model",
  model_packaged: "{id} (packaged, rendered heads only)",
  intent_preview: "Preview",
  intent_balanced: "Balanced",
  intent_best: "Best",
  about_preview: "To check timing and framing",
  about_balanced: "The sensible choice",
  about_best: "The most steps",
  steps: "{count, steps}",
  time_unknown: "known after one video",
  time_measuring: "timing …",
  shape: "Shape",
  "shape_16:9": "Wide 16:9",
  "shape_1:1": "Square 1:1",
  "shape_9:16": "Tall 9:16",
  shape_auto: "As portrait",
  shape_only: "This model makes {sizes} only.",
  shape_size: "{size} pixels",
  advanced: "Advanced settings",
  advanced_hint: "An empty field keeps the value in grey. Several numbers are separated by commas.",
  advanced_unset: "as configured ({value})",
  fixed: "Settings of the model, for every video",
  fixed_hint: "The model is loaded with these. Start the page again to change one, such as:",
  fixed_command: "omniavatar web --hp seq_len=200,crf=16",
  nothing: "none",

  plan: "Before it runs",
  plan_length: "Video",
  plan_size: "Size",
  plan_work: "Work",
  plan_time: "Time here",
  plan_ready: "Ready at about",
  plan_cost: "Cost",
  plan_work_value: "{windows} × {steps}",
  plan_free: "free, your machine",
  plan_price: "about {amount} at {price} an hour",
  plan_waiting: "Choose a portrait and a voice to see what the video takes.",
  plan_checking: "Checking the files …",
  plan_after: "It waits for {count, videos} before it.",
  plan_unknown: "unknown",
  make: "Make video",
  making: "Sending …",

  stage: "Now",
  stage_empty: "The video appears here while it is being made.",
  player: "Video",
  progress: "Progress of the video",
  run_queued: "Waiting for its turn",
  run_starting: "The worker is starting",
  run_loading: "Loading the model",
  worker_problem: "The worker does not start, and tries again: {problem}",
  run_making: "Making window {window} of {windows}",
  run_left: "{percent} %, about {time} left",
  run_percent: "{percent} %",
  run_detail: "window {window}/{windows}, step {step}/{steps}",
  run_live: "{percent} percent",
  run_done: "The video is finished.",
  run_cancelling: "Cancelling at the next step …",
  growing: "playing what is finished so far",
  cancel: "Cancel",
  cancel_named: "Cancel “{prompt}”",
  cancelled: "Cancelled",
  failed: "Failed",

  queue: "Waiting",
  queue_place: "number {place} in the queue",
  gallery: "Your videos",
  gallery_empty: "Finished videos stay here, with the settings they were made from.",
  more: "Show more",
  play_named: "Play “{prompt}”",
  again: "Use settings",
  again_named: "Use the settings of “{prompt}” again",
  download: "Download",
  download_named: "Download “{prompt}”",
  delete: "Delete",
  delete_named: "Delete “{prompt}”",
  delete_sure: "Really delete?",
  made: "{seconds}, {size}, {when}",
  reused: "The settings of that video are in the form.",
  reused_partly: "The settings of that video are in the form, but not its {missing}; choose it again.",
  missing_portrait: "portrait",
  missing_voice: "voice",

  talk: "Speak as the portrait",
  talk_text: "The face speaks along with your microphone or a sound file. It uses the portrait of the first tab.",
  talk_start: "Open",
  talk_with: "Portrait: {name}",
  talk_default: "Portrait: the packaged one",
  talk_none: "Talking is not available: {remedy}",
  talk_frame: "The live page",

  offline: "The server does not answer. Start it again with “omniavatar web”: finished parts are kept and the videos go on. This page connects by itself.",
  no_key: "This server needs its key. Open the address that “omniavatar web” printed; if that has no key in it, start it again.",
  server_problem: "The server has a problem ({message}).",
  too_large: "The file has {size}; this server takes {most}. Make it smaller.",
  about: "OmniAvatar {version} on this machine. Nothing leaves it.",

  one_steps: "{count} step", other_steps: "{count} steps",
  one_videos: "{count} video", other_videos: "{count} videos",
  one_windows: "{count} window", other_windows: "{count} windows",
  seconds: "{value} s", minutes: "{value} min", hours: "{value} h",
};

// The text of a key with its values.
export function t(key, values = {}) {
  const text = STRINGS[key];
  if (text === undefined) throw new Error(`no string ${key}`);
  return text.replace(/\{(\w+)(?:, (\w+))?\}/g, (_, name, noun) => (noun ? count(values[name], noun) : String(values[name])));
}

export function count(number, noun) {
  return t(`${number === 1 ? "one" : "other"}_${noun}`, { count: number });
}

// Seconds as a person says them.
export function duration(seconds) {
  if (seconds < 60) return t("seconds", { value: seconds < 10 ? Number(seconds.toFixed(1)) : Math.round(seconds) });
  if (seconds < 5400) return t("minutes", { value: seconds < 600 ? Number((seconds / 60).toFixed(1)) : Math.round(seconds / 60) });
  return t("hours", { value: Number((seconds / 3600).toFixed(1)) });
}

export function bytes(size) {
  return size < 1e6 ? `${Math.round(size / 1e3)} kB` : `${(size / 1e6).toFixed(size < 1e7 ? 1 : 0)} MB`;
}

// Fills every element with its text: data-t, data-t-label (aria-label), data-t-placeholder, data-t-title.
export function fill(root) {
  for (const item of root.querySelectorAll("[data-t]")) item.textContent = t(item.dataset.t);
  for (const item of root.querySelectorAll("[data-t-label]")) item.setAttribute("aria-label", t(item.dataset.tLabel));
  for (const item of root.querySelectorAll("[data-t-placeholder]")) item.placeholder = t(item.dataset.tPlaceholder);
  for (const item of root.querySelectorAll("[data-t-title]")) item.title = t(item.dataset.tTitle);
}
