/* Makes one write or sync of an outbox's files fail. Loaded with LD_PRELOAD around the unchanged library.
 *
 * Counted are the calls on files whose name contains "agent.db"; the n-th fails with the errno that was asked for.
 * Nothing of it reaches the file: a real disk may also have written some of it, which power loss is for.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static long seen, wanted = -1;
static int failure;
static char what[64];

void disk_fails_at(long number, int error) { seen = 0; wanted = number; failure = error; what[0] = 0; }
long disk_calls(void) { return seen; }
const char *disk_failed(void) { return what; }

static int fails(int descriptor, const char *call) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "agent.db") || strstr(path, "-lock")) return 0;
    if (seen++ != wanted) return 0;
    const char *suffix = strrchr(path, '-');
    snprintf(what, sizeof what, "%s %s", call, suffix && strlen(suffix) < 12 ? suffix : "");
    errno = failure;
    return 1;
}

#define WRAP(type, name, parameters, arguments)                          \
    type name parameters {                                               \
        static type (*real) parameters;                                  \
        if (!real) real = (type (*) parameters) dlsym(RTLD_NEXT, #name); \
        if (fails(descriptor, #name)) return -1;                         \
        return real arguments;                                           \
    }

WRAP(ssize_t, pwrite, (int descriptor, const void *bytes, size_t count, off_t at), (descriptor, bytes, count, at))
WRAP(ssize_t, pwrite64, (int descriptor, const void *bytes, size_t count, off64_t at), (descriptor, bytes, count, at))
WRAP(ssize_t, write, (int descriptor, const void *bytes, size_t count), (descriptor, bytes, count))
WRAP(int, ftruncate, (int descriptor, off_t size), (descriptor, size))
WRAP(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size))
WRAP(int, fsync, (int descriptor), (descriptor))
WRAP(int, fdatasync, (int descriptor), (descriptor))

int posix_fallocate64(int descriptor, off64_t at, off64_t size) {
    static int (*real)(int, off64_t, off64_t);
    if (!real) real = (int (*)(int, off64_t, off64_t)) dlsym(RTLD_NEXT, "posix_fallocate64");
    return fails(descriptor, "posix_fallocate") ? failure : real(descriptor, at, size);
}
int posix_fallocate(int descriptor, off_t at, off_t size) { return posix_fallocate64(descriptor, at, size); }
