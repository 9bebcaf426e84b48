/*
 * The panel's common ground: its one global, texts, figures as words, elements.
 *
 * Problem: the WebUI loads every file of javascript/ as a classic script, in an order that other extensions can change. So each file only
 * adds functions to the one global `asyncLowvram`, and none calls another before the page is there (async_lowvram_page.js starts it all).
 *
 * Invariants: every text a user reads goes through t(), always with a literal, so that tests/webui/localized_texts.py can list them for
 * the localisation files; whatever came from the server reaches the page by textContent alone; an unknown figure (null) is shown as a
 * dash, never as 0.
 */
"use strict";
window.asyncLowvram = window.asyncLowvram || {};
(function(ours) {
    ours.SCHEMA = 1;
    ours.UNKNOWN = "\u2013";
    const MB = 2 ** 20, GB = 2 ** 30; // as the settings count them; rates are in 10**9 bytes per second, as everywhere in this project

    /** What keys of our own begin with, looked up first: "copy" or "Details" mean something else elsewhere and in others' localisations. */
    ours.OWN = "Async LowVRAM: ";

    /** `template` in the user's language, by the WebUI's localization, then its {placeholders} filled in from `values`. */
    ours.t = function(template, values) {
        const known = window.localization || {};
        const has = (key) => Object.prototype.hasOwnProperty.call(known, key) && typeof known[key] === "string" && known[key];
        const key = [ours.OWN + template, template].find(has);
        return ours.fill(key === undefined ? template : known[key], values);
    };

    /** `text` with its {placeholders} filled in; one without a value stays as it is. */
    ours.fill = function(text, values) {
        if (!values) return text;
        const given = (key) => Object.prototype.hasOwnProperty.call(values, key);
        return text.replace(/\{(\w+)\}/g, (whole, key) => (given(key) ? String(values[key]) : whole));
    };

    /** Whether `value` is a figure that is known: null, undefined, NaN and what is no number are not. */
    ours.known = (value) => typeof value === "number" && Number.isFinite(value);

    /** Seconds, rates and shares that are only ever known as more than nothing: the server also says 0 where it has not measured. */
    ours.positive = (value) => ours.known(value) && value > 0;

    function figure(value, digits) {
        return value.toFixed(digits);
    }

    /** Bytes as "412 MB" or "1.25 GB". */
    ours.bytes = function(value) {
        if (!ours.known(value)) return ours.UNKNOWN;
        if (Math.abs(value) >= GB) return ours.t("{n} GB", {n: figure(value / GB, 2)});
        return ours.t("{n} MB", {n: figure(value / MB, value !== 0 && Math.abs(value) < 10 * MB ? 1 : 0)});
    };

    /** Seconds as "1.25 s" or "3.2 ms". */
    ours.seconds = function(value) {
        if (!ours.known(value)) return ours.UNKNOWN;
        if (Math.abs(value) >= 1) return ours.t("{n} s", {n: figure(value, 2)});
        const ms = value * 1000;
        return ours.t("{n} ms", {n: figure(ms, Math.abs(ms) >= 100 ? 0 : Math.abs(ms) >= 10 ? 1 : 2)});
    };

    /** Bytes per second as "12.3 GB/s". */
    ours.rate = function(value) {
        if (!ours.positive(value)) return ours.UNKNOWN;
        return value >= 1e9 ? ours.t("{n} GB/s", {n: figure(value / 1e9, 1)}) : ours.t("{n} MB/s", {n: figure(value / 1e6, 0)});
    };

    /** A share (0.83) as "83%". */
    ours.percent = (share) => (ours.known(share) ? `${figure(share * 100, 0)}%` : ours.UNKNOWN);

    /** Passes of `seconds` as the WebUI writes its speed: "2.43it/s", or "1.52s/it" when a pass takes longer than a second. */
    ours.speed = function(seconds) {
        if (!ours.positive(seconds)) return ours.UNKNOWN;
        return seconds > 1 ? ours.t("{n} s/it", {n: figure(seconds, 2)}) : ours.t("{n} it/s", {n: figure(1 / seconds, 2)});
    };

    /** How many times as fast, "2.4". Digits enough for two that hardly differ. */
    ours.times = (ratio) => (ours.positive(ratio) ? figure(ratio, ratio < 10 ? 2 : 1) : ours.UNKNOWN);

    /**
     * A new element. `attributes`: className and other properties by name, aria-* and others with a dash as attributes; `children`:
     * elements, or strings, which become text.
     */
    ours.element = function(name, attributes, children) {
        const made = document.createElement(name);
        for (const [key, value] of Object.entries(attributes || {})) {
            if (key.includes("-") || key === "role" || key === "for") made.setAttribute(key, value);
            else made[key] = value;
        }
        made.append(...(children || []));
        return made;
    };

    /**
     * Set the text of an element that has none but text. In place: the WebUI watches the whole page for added nodes, and every one makes
     * each extension look through it.
     */
    ours.setText = function(element, text) {
        const held = element.firstChild;
        if (held && held.nodeType === Node.TEXT_NODE && element.childNodes.length === 1) {
            if (held.data !== text) held.data = text;
        } else if (element.textContent !== text || held) {
            element.textContent = text;
        }
    };

    ours.setAttribute = function(element, name, value) {
        if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
    };

    ours.show = function(element, shown) {
        if (element.hidden === shown) element.hidden = !shown;
    };

    /**
     * The address of one of our routes, as the page sees it: beside the page, as the WebUI's own requests are, so that it holds under
     * --subpath and behind a proxy. A page asked for without the slash at its end ("/sd") is helped by gradio's own idea of its root.
     */
    ours.address = function(path) {
        const page = new URL(document.baseURI);
        const told = window.gradio_config && typeof window.gradio_config.root === "string" ? window.gradio_config.root : "";
        let root = "";
        try {
            root = told ? new URL(told, page).pathname.replace(/\/+$/, "") : "";
        } catch {
            root = ""; // not an address: the page's own is all there is
        }
        const base = root && (page.pathname === root || page.pathname.startsWith(`${root}/`)) ? `${root}/` : page.pathname;
        return new URL(`async-lowvram/${path}`, new URL(base, page.origin)).href;
    };
})(window.asyncLowvram);
