// Small helpers for elements.
export const at = (id) => document.getElementById(id);

// An element with properties; `data` and names with a dash become attributes.
export function el(tag, properties = {}, ...children) {
  const item = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.includes("-") || name === "role" || name === "for") item.setAttribute(name, value);
    else item[name] = value;
  }
  item.append(...children.filter((child) => child !== null && child !== undefined));
  return item;
}

// Shows what is wrong with a field, or nothing.
export function complain(id, text = "", field = null) {
  const place = at(id);
  if (place.textContent !== text) place.textContent = text;
  if (!field) return;
  if (text) field.setAttribute("aria-invalid", "true");
  else field.removeAttribute("aria-invalid");
}

// Calls `use` with the file that is dropped on an element.
export function onDrop(item, use) {
  const over = (event) => {
    event.preventDefault();
    item.classList.toggle("over", event.type === "dragover");
  };
  for (const name of ["dragover", "dragleave", "drop"]) item.addEventListener(name, over);
  item.addEventListener("drop", (event) => {
    const [file] = event.dataTransfer.files;
    if (file) use(file);
  });
}

// A function that runs once, `wait` milliseconds after the last call.
export function later(run, wait) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(run, wait);
  };
}
