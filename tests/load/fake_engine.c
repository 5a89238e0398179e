// A fake engine: an OpenAI-compatible HTTP/1.1 server that costs next to nothing, so that what stands before it shows.
// It never computes anything: an answer's pace and length are the request's own, and its text is the time of day.
//
//   fake_engine PORT          (0 takes a free one; the port is printed once it listens)
//
// One thread, epoll, keep-alive. A request says how it wants to be answered, in the OpenAI body's own fields so that
// every gateway passes it on: "stream", "max_tokens" (or "max_completion_tokens"), "stream_options.include_usage" and
// "stream_options.continuous_usage_stats", and in its prompt any of these words:
//   pace_ms=N  milliseconds between tokens; 0 sends all of them at once       (20 when absent)
//   ttft_ms=N  milliseconds before the first token                            (0 when absent)
//   step=1     tokens of all such streams come on one common grid of pace_ms, as those of one batch of an engine do
//
// Each token is "T<16 digits> ": CLOCK_MONOTONIC in nanoseconds when it was written, so that a client on the same
// machine knows each chunk's age. GET /stats tells the streams that are open and the requests there were.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum {
    READ_BYTES = 65536,
    BACKLOG = 4096,
    EVENTS = 256,
    DEFAULT_TOKENS = 64,
    DEFAULT_PACE_MS = 20,
    PROMPT_TOKENS = 12,
    // A reader that leaves this much unread gets no further tokens until it has caught up.
    PENDING_BYTES = 256 << 10,
};
static const uint64_t NS_PER_MS = 1000000;
static const uint64_t NS_PER_S = 1000000000;

typedef struct {
    char *bytes;
    size_t size, capacity;
} Buffer;

typedef struct Conn {
    int fd;
    bool wants_write;
    Buffer in, out;
    size_t sent; // how much of `out` has left
    // The stream under way.
    bool streaming, started, usage, interim_usage, step;
    long tokens, left;
    uint64_t pace, due;
    // Its place in the agenda, and in the list of what is closed at the end of a turn.
    size_t place;
    bool dead;
} Conn;

static int poller, listener;
static uint64_t requests, streams;

static uint64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * NS_PER_S + (uint64_t)now.tv_nsec;
}

static void *checked(void *memory) {
    if (!memory) {
        perror("fake_engine");
        exit(1);
    }
    return memory;
}

static void append(Buffer *buffer, const char *bytes, size_t size) {
    if (buffer->size + size > buffer->capacity) {
        buffer->capacity = (buffer->size + size) * 2;
        buffer->bytes = checked(realloc(buffer->bytes, buffer->capacity));
    }
    memcpy(buffer->bytes + buffer->size, bytes, size);
    buffer->size += size;
}

// --- The agenda: a binary heap of streams, ordered by when their next token is due -----------------------------------

static Conn **agenda;
static size_t agenda_size, agenda_capacity;

static void agenda_put(Conn *conn, size_t place) {
    agenda[place] = conn;
    conn->place = place;
}

static void agenda_up(Conn *conn, size_t place) {
    while (place > 0 && agenda[(place - 1) / 2]->due > conn->due) {
        agenda_put(agenda[(place - 1) / 2], place);
        place = (place - 1) / 2;
    }
    agenda_put(conn, place);
}

static void agenda_down(Conn *conn, size_t place) {
    for (;;) {
        size_t child = place * 2 + 1;
        if (child >= agenda_size) break;
        if (child + 1 < agenda_size && agenda[child + 1]->due < agenda[child]->due) child++;
        if (agenda[child]->due >= conn->due) break;
        agenda_put(agenda[child], place);
        place = child;
    }
    agenda_put(conn, place);
}

static void agenda_add(Conn *conn) {
    if (agenda_size == agenda_capacity) {
        agenda_capacity = agenda_capacity ? agenda_capacity * 2 : 1024;
        agenda = checked(realloc(agenda, agenda_capacity * sizeof *agenda));
    }
    agenda_up(conn, agenda_size++);
}

static void agenda_remove(Conn *conn) {
    size_t place = conn->place;
    Conn *last = agenda[--agenda_size];
    if (last == conn) return;
    agenda_down(last, place);
    agenda_up(last, last->place);
}

// --- Connections -----------------------------------------------------------------------------------------------------

static void watch(Conn *conn, int operation, bool wants_write) {
    struct epoll_event event = {.events = EPOLLIN | (wants_write ? EPOLLOUT : 0), .data.ptr = conn};
    epoll_ctl(poller, operation, conn->fd, &event);
    conn->wants_write = wants_write;
}

static void end_stream(Conn *conn) {
    if (!conn->streaming) return;
    conn->streaming = false;
    streams--;
    agenda_remove(conn);
}

// Several events of one turn may concern a connection, so it is freed only at the turn's end.
static Conn **dead;
static size_t dead_count, dead_capacity;

static void close_connection(Conn *conn) {
    if (conn->dead) return;
    conn->dead = true;
    end_stream(conn);
    close(conn->fd);
    if (dead_count == dead_capacity) {
        dead_capacity = dead_capacity ? dead_capacity * 2 : 64;
        dead = checked(realloc(dead, dead_capacity * sizeof *dead));
    }
    dead[dead_count++] = conn;
}

static void free_dead(void) {
    while (dead_count) {
        Conn *conn = dead[--dead_count];
        free(conn->in.bytes);
        free(conn->out.bytes);
        free(conn);
    }
}

static void flush(Conn *conn) {
    while (conn->sent < conn->out.size) {
        ssize_t count = send(conn->fd, conn->out.bytes + conn->sent, conn->out.size - conn->sent, MSG_NOSIGNAL);
        if (count < 0 && errno == EAGAIN) {
            if (!conn->wants_write) watch(conn, EPOLL_CTL_MOD, true);
            return;
        }
        if (count < 0) {
            close_connection(conn);
            return;
        }
        conn->sent += (size_t)count;
    }
    conn->sent = conn->out.size = 0;
    if (conn->wants_write) watch(conn, EPOLL_CTL_MOD, false);
}

// --- Answers, as vLLM words them -------------------------------------------------------------------------------------

#define ID "\"id\":\"chatcmpl-0123456789abcdef0123456789abcdef\""
#define CHUNK ID ",\"object\":\"chat.completion.chunk\",\"created\":1730000000,\"model\":\"m\""

// One server-sent event as one chunk of the body, RFC 9112 section 7.1.
static void put_event(Conn *conn, const char *data) {
    char chunk[1024];
    int size = (int)(strlen("data: ") + strlen(data) + strlen("\n\n"));
    int written = snprintf(chunk, sizeof chunk, "%x\r\ndata: %s\n\n\r\n", (unsigned)size, data);
    append(&conn->out, chunk, (size_t)written);
}

static void put_choice(Conn *conn, const char *delta, const char *finish_reason, long made) {
    char data[768], usage[128] = "";
    if (conn->interim_usage)
        snprintf(usage, sizeof usage,
                 ",\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%ld,\"completion_tokens\":%ld}", PROMPT_TOKENS,
                 PROMPT_TOKENS + made, made);
    snprintf(data, sizeof data,
             "{" CHUNK ",\"choices\":[{\"index\":0,\"delta\":{%s},\"logprobs\":null,\"finish_reason\":%s}]%s}", delta,
             finish_reason, usage);
    put_event(conn, data);
}

static void put_token(Conn *conn) {
    char text[64];
    if (!conn->started) {
        conn->started = true;
        put_choice(conn, "\"role\":\"assistant\",\"content\":\"\"", "null", 0);
    }
    snprintf(text, sizeof text, "\"content\":\"T%016" PRIu64 " \"", now_ns());
    conn->left--;
    put_choice(conn, text, "null", conn->tokens - conn->left);
    if (conn->left > 0) return;
    put_choice(conn, "\"content\":\"\"", "\"stop\"", conn->tokens);
    if (conn->usage) {
        char data[512];
        snprintf(data, sizeof data,
                 "{" CHUNK
                 ",\"choices\":[],\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%ld,\"completion_tokens\":%ld}}",
                 PROMPT_TOKENS, PROMPT_TOKENS + conn->tokens, conn->tokens);
        put_event(conn, data);
    }
    put_event(conn, "[DONE]");
    append(&conn->out, "0\r\n\r\n", 5);
    end_stream(conn);
}

static void put_document(Conn *conn, const char *json) {
    char head[256];
    int size =
        snprintf(head, sizeof head, "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %zu\r\n\r\n",
                 strlen(json));
    append(&conn->out, head, (size_t)size);
    append(&conn->out, json, strlen(json));
}

static void put_completion(Conn *conn, long tokens) {
    char json[1024];
    snprintf(json, sizeof json,
             "{" ID ",\"object\":\"chat.completion\",\"created\":1730000000,\"model\":\"m\",\"choices\":[{\"index\":0,"
             "\"message\":{\"role\":\"assistant\",\"content\":\"The quick brown fox jumps over the lazy dog, and then "
             "it goes home to have some tea.\",\"refusal\":null,\"tool_calls\":[]},\"logprobs\":null,"
             "\"finish_reason\":\"stop\",\"stop_reason\":null}],\"service_tier\":null,\"system_fingerprint\":null,"
             "\"usage\":{\"prompt_tokens\":%d,\"total_tokens\":%ld,\"completion_tokens\":%ld,"
             "\"prompt_tokens_details\":null}}",
             PROMPT_TOKENS, PROMPT_TOKENS + tokens, tokens);
    put_document(conn, json);
}

// --- Requests --------------------------------------------------------------------------------------------------------

// The integer after the first `name` of the body and whatever separates the two, or `otherwise`.
static long number_after(const char *body, const char *name, long otherwise) {
    const char *at = strstr(body, name);
    if (!at) return otherwise;
    at += strlen(name);
    at += strspn(at, "\": =");
    return *at >= '0' && *at <= '9' ? strtol(at, NULL, 10) : otherwise;
}

static bool is_true(const char *body, const char *name) {
    const char *at = strstr(body, name);
    if (!at) return false;
    at += strlen(name);
    at += strspn(at, ": ");
    return strncmp(at, "true", 4) == 0;
}

// The next tick of the common grid, or simply `due`.
static uint64_t on_grid(const Conn *conn, uint64_t due) {
    return conn->step && conn->pace ? (due + conn->pace - 1) / conn->pace * conn->pace : due;
}

static void start_stream(Conn *conn, const char *body, long tokens) {
    const char *head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n"
                       "Transfer-Encoding: chunked\r\n\r\n";
    append(&conn->out, head, strlen(head));
    conn->streaming = true;
    conn->started = false;
    conn->tokens = conn->left = tokens;
    conn->usage = is_true(body, "\"include_usage\"");
    conn->interim_usage = conn->usage && is_true(body, "\"continuous_usage_stats\"");
    conn->step = number_after(body, "step=", 0) != 0;
    conn->pace = (uint64_t)number_after(body, "pace_ms=", DEFAULT_PACE_MS) * NS_PER_MS;
    conn->due = on_grid(conn, now_ns() + (uint64_t)number_after(body, "ttft_ms=", 0) * NS_PER_MS);
    streams++;
    agenda_add(conn);
}

static void answer(Conn *conn, const char *head, const char *body) {
    if (strncmp(head, "POST ", 5) == 0) {
        requests++;
        long tokens =
            number_after(body, "\"max_tokens\"", number_after(body, "\"max_completion_tokens\"", DEFAULT_TOKENS));
        if (tokens < 1) tokens = 1;
        if (is_true(body, "\"stream\"")) {
            start_stream(conn, body, tokens);
        } else {
            put_completion(conn, tokens);
        }
    } else if (strncmp(head, "GET /stats", 10) == 0) {
        char json[96];
        snprintf(json, sizeof json, "{\"streams\":%" PRIu64 ",\"requests\":%" PRIu64 "}", streams, requests);
        put_document(conn, json);
    } else if (strstr(head, "/v1/models")) {
        put_document(conn, "{\"object\":\"list\",\"data\":[{\"id\":\"m\",\"object\":\"model\",\"created\":1730000000,"
                           "\"owned_by\":\"vllm\",\"root\":\"m\",\"max_model_len\":8192}]}");
    } else if (strstr(head, "_info")) {
        // What routers ask an engine about itself.
        put_document(conn, "{\"model_path\":\"m\",\"served_model_name\":\"m\",\"version\":\"0.11.0\","
                           "\"tokenizer_path\":\"m\",\"is_generation\":true,\"tp_size\":1,\"dp_size\":1}");
    } else {
        put_document(conn, "{\"status\":\"ok\"}");
    }
}

// The value of a header in a head of which every line ends with CRLF, or NULL.
static const char *header(const char *head, const char *name) {
    size_t size = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line; line = strstr(line + 2, "\r\n")) {
        if (strncasecmp(line + 2, name, size) == 0 && line[2 + size] == ':') {
            return line + 3 + size + strspn(line + 3 + size, " \t");
        }
    }
    return NULL;
}

// Puts the data of a chunked body together in place. Returns the bytes that the body took of the input, its final CRLF
// included, or 0 while it is not whole; *size becomes the data's.
static size_t join_chunks(char *body, size_t available, size_t *size) {
    size_t at = 0, joined = 0;
    // Two passes, as nothing may be moved before all of it is there.
    for (int moving = 0; moving < 2; moving++) {
        at = joined = 0;
        for (;;) {
            char *line_end = memmem(body + at, available - at, "\r\n", 2);
            if (!line_end) return 0;
            size_t chunk = strtoul(body + at, NULL, 16);
            at = (size_t)(line_end - body) + 2;
            if (at + chunk + 2 > available) return 0;
            if (moving) memmove(body + joined, body + at, chunk);
            joined += chunk;
            at += chunk + 2;
            if (chunk == 0) break;
        }
    }
    *size = joined;
    return at;
}

// Answers the first request of the input and removes it; false while it is not whole.
static bool take_request(Conn *conn) {
    append(&conn->in, "", 1);
    conn->in.size--;
    char *head = conn->in.bytes;
    char *head_end = strstr(head, "\r\n\r\n");
    if (!head_end) return false;
    char *body = head_end + 4;
    size_t available = conn->in.size - (size_t)(body - head), size = 0, taken = 0;
    // From here on the head is text of its own.
    head_end[2] = 0;
    const char *length = header(head, "content-length"), *coding = header(head, "transfer-encoding");
    if (length) {
        size = taken = strtoul(length, NULL, 10);
        if (available < size) taken = SIZE_MAX;
    } else if (coding && strncasecmp(coding, "chunked", 7) == 0) {
        taken = join_chunks(body, available, &size);
        if (taken == 0) taken = SIZE_MAX;
    }
    if (taken == SIZE_MAX) {
        head_end[2] = '\r';
        return false;
    }
    char after = body[size];
    body[size] = 0;
    answer(conn, head, body);
    body[size] = after;
    size_t used = (size_t)(body - head) + taken;
    memmove(head, head + used, conn->in.size - used);
    conn->in.size -= used;
    return true;
}

static void serve(Conn *conn) {
    while (!conn->dead && !conn->streaming && conn->in.size && take_request(conn)) {}
    if (!conn->dead) flush(conn);
}

static void on_readable(Conn *conn) {
    static char bytes[READ_BYTES];
    for (;;) {
        ssize_t count = recv(conn->fd, bytes, sizeof bytes, 0);
        if (count == 0 || (count < 0 && errno != EAGAIN)) {
            close_connection(conn);
            return;
        }
        if (count < 0) break;
        append(&conn->in, bytes, (size_t)count);
        if ((size_t)count < sizeof bytes) break;
    }
    serve(conn);
}

static void accept_all(void) {
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC), on = 1;
        if (fd < 0) return;
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        Conn *conn = checked(calloc(1, sizeof *conn));
        conn->fd = fd;
        watch(conn, EPOLL_CTL_ADD, false);
    }
}

// Writes every token that is due.
static void tick(void) {
    for (uint64_t now = now_ns(); agenda_size && agenda[0]->due <= now;) {
        Conn *conn = agenda[0];
        if (conn->out.size - conn->sent > PENDING_BYTES) {
            conn->due = now + DEFAULT_PACE_MS * NS_PER_MS;
            agenda_down(conn, conn->place);
            continue;
        }
        uint64_t was_due = conn->due;
        do {
            put_token(conn);
        } while (conn->streaming && conn->pace == 0);
        if (conn->streaming) {
            // A stream that fell far behind goes on from now; one that is a little late keeps to its own time.
            uint64_t from = was_due + 50 * conn->pace < now ? now : was_due;
            conn->due = on_grid(conn, from + (conn->step ? 1 : conn->pace));
            agenda_down(conn, conn->place);
        }
        flush(conn);
        if (!conn->dead && !conn->streaming && conn->in.size) serve(conn);
    }
}

static int listen_on(uint16_t port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), on = 1;
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (struct sockaddr *)&address, size) || listen(fd, BACKLOG) ||
        getsockname(fd, (struct sockaddr *)&address, &size)) {
        perror("fake_engine");
        exit(1);
    }
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    return fd;
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: fake_engine PORT\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    // Timers fire when they are due, not up to 50 us later.
    prctl(PR_SET_TIMERSLACK, 1);
    poller = epoll_create1(EPOLL_CLOEXEC);
    listener = listen_on((uint16_t)atoi(argv[1]));
    struct epoll_event accepts = {.events = EPOLLIN, .data.ptr = NULL}, events[EVENTS];
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &accepts);
    for (;;) {
        tick();
        free_dead();
        struct timespec pause, *timeout = NULL;
        if (agenda_size) {
            uint64_t now = now_ns(), wait = agenda[0]->due > now ? agenda[0]->due - now : 0;
            pause = (struct timespec){.tv_sec = (time_t)(wait / NS_PER_S), .tv_nsec = (long)(wait % NS_PER_S)};
            timeout = &pause;
        }
        int count = epoll_pwait2(poller, events, EVENTS, timeout, NULL);
        for (int i = 0; i < count; i++) {
            Conn *conn = events[i].data.ptr;
            if (!conn) {
                accept_all();
                continue;
            }
            if (!conn->dead && (events[i].events & EPOLLOUT)) flush(conn);
            if (!conn->dead && (events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))) on_readable(conn);
        }
    }
}
