// An image and a caption, token by region: the search page, the explorer and the docs' home page draw pairs with this.

// A DOM element; attributes that begin with "on" are event listeners.
function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.filter(c => c !== null && c !== undefined));
  return made;
}

const percent = value => `${(100 * value).toFixed(2)}%`;
const plain = word => word.replace(/^##/, "");
const name = (pair, r) => pair.regions[r].tag ?? `region ${r + 1}`;

// The button over a region. It holds a piece of the coloured picture, which shows when the rest is grey.
function regionButton(pair, r, onclick) {
  const [x1, y1, x2, y2] = pair.regions[r].box;
  const width = Math.max(x2 - x1, .001), height = Math.max(y2 - y1, .001);
  const place = `left:${percent(x1)};top:${percent(y1)};width:${percent(width)};height:${percent(height)}`;
  const tag = pair.regions[r].tag;
  const button = node("button", {
    type: "button", class: "al-region", "data-region": r, "aria-pressed": "false", onclick,
    "aria-label": `region ${r + 1}${tag ? `, ${tag}` : ""}`, title: name(pair, r),
    style: `${place};z-index:${Math.round(1000 * (1 - width * height))}`,  // small regions stay above large ones
  });
  if (pair.picture) {
    const left = width < .999 ? x1 / (1 - width) : 0, top = height < .999 ? y1 / (1 - height) : 0;
    button.append(node("span", { class: "al-colour", style:
      `background-image:url("${pair.picture}");background-size:${percent(1 / width)} ${percent(1 / height)};` +
      `background-position:${percent(left)} ${percent(top)}` }));
  }
  button.append(node("span", { class: "al-label" }));
  return button;
}

// The button of a token, with a bar for what it adds to the score; `most` is the largest such value.
function wordButton(word, w, most, onclick) {
  const bar = { class: word.score < 0 ? "al-minus" : "", style: `height:${percent(Math.abs(word.score) / most)}` };
  return node("button", {
    type: "button", class: "al-word" + (word.text.startsWith("##") ? " al-piece" : ""), "data-word": w,
    "aria-pressed": "false", title: `${plain(word.text)}: adds ${word.score.toFixed(2)}`, onclick,
  }, node("span", { class: "al-name" }, plain(word.text)), node("span", { class: "al-bar" }, node("i", bar)),
    node("small", {}, word.score.toFixed(2)));
}

// A sentence about the chosen word or region.
function sentence(pair, word, region) {
  const quoted = w => `“${plain(pair.words[w].text)}”`;
  if (word !== null) {
    const best = pair.words[word].region;
    if (best === null) return "";
    const cosine = pair.cosines[best][word].toFixed(2), adds = pair.words[word].score.toFixed(2);
    return `${quoted(word)} points at ${name(pair, best)}, cosine ${cosine}, and adds ${adds} to the score.`;
  }
  if (region !== null) {
    const all = pair.words.map((_, w) => w), cosines = pair.cosines[region];
    const won = all.filter(w => pair.words[w].region === region).map(quoted).join(", ") || "no word";
    const nearest = cosines.indexOf(Math.max(...cosines));
    const near = nearest < 0 ? "none" : `${quoted(nearest)}, cosine ${cosines[nearest].toFixed(2)}`;
    return `${name(pair, region)} is the best region of ${won}; nearest to it is ${near}.`;
  }
  return "Choose a word to see its regions, or a region to see its words.";
}

// Words above, regions over the picture. `pair` is what `explain` of aladin.search.page returns, with the picture's
// address; `start` is the word that is chosen at first. The element's method `light` chooses another word or region.
function pairView(pair, start = null) {
  const lit = { word: null, region: null };
  const picture = node("div", { class: "al-picture" });
  if (pair.picture) picture.style.backgroundImage = `url("${pair.picture}")`;
  if (pair.ratio) picture.style.aspectRatio = pair.ratio;
  const says = node("p", { class: "al-says", "aria-live": "polite" });
  const most = Math.max(.01, ...pair.words.map(w => Math.abs(w.score)));
  const regions = pair.regions.map((_, r) =>
    regionButton(pair, r, () => light({ region: lit.region === r ? null : r })));
  const words = pair.words.map((word, w) =>
    wordButton(word, w, most, () => light({ word: lit.word === w ? null : w })));
  picture.append(...regions);

  function light({ word = null, region = null }) {
    lit.word = word;
    lit.region = region;
    words.forEach((button, w) => {
      const share = region === null ? 0 : Math.max(0, pair.cosines[region][w]);
      button.setAttribute("aria-pressed", word === w);
      button.style.setProperty("--share", share.toFixed(3));
      button.classList.toggle("al-lit", region !== null && pair.words[w].region === region);
    });
    const best = word === null ? null : pair.words[word].region;
    const top = best === null ? 1 : Math.max(.01, pair.cosines[best][word]);
    regions.forEach((button, r) => {
      const cosine = word === null ? 0 : pair.cosines[r][word], tag = pair.regions[r].tag ?? "";
      button.setAttribute("aria-pressed", region === r);
      button.style.setProperty("--share", Math.max(0, Math.min(1, cosine / top)).toFixed(3));
      button.classList.toggle("al-best", word !== null && r === best);
      button.classList.toggle("al-chosen", region === r);
      const label = word !== null ? `${tag} ${cosine.toFixed(2)}` : region === r ? tag : "";
      button.querySelector(".al-label").textContent = label;
    });
    picture.classList.toggle("al-dim", word !== null || region !== null);
    says.textContent = sentence(pair, word, region);
  }

  const matching = pair.matching ?? null;
  const sum = node("p", { class: "al-sum" }, node("b", {}, `alignment score ${pair.score.toFixed(2)}`), ` ${pair.formula}`,
    matching === null ? "" : `; matching score ${matching.toFixed(2)}, one cosine of two vectors`);
  const list = node("div", { class: "al-words", role: "group", "aria-label": "words" }, ...words);
  const view = node("div", { class: "al-pair" }, picture, node("div", { class: "al-explain" }, list, sum, says));
  light(start === null ? {} : { word: start });
  view.light = light;
  return view;
}
