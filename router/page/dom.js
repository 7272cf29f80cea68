// Elements of the page. Text is always text, never markup.

export const by = (id) => document.getElementById(id);

export function element(tag, parent, text = "", kind = "") {
  const made = document.createElement(tag);
  if (text !== "") made.textContent = text;
  if (kind) made.className = kind;
  return parent ? parent.appendChild(made) : made;
}
